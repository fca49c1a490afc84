//! The memory that connections of the proxy take where neither side reads: no more than is stated, also over a restart.

mod common;

use std::os::unix::net::UnixListener;

use common::{Client, MemoryGroup, OWNER, Start, clog_all, setting};

fn config(connections: usize, more: &str) -> String {
    format!("{OWNER}[limits]\nconnections = {connections}\nconnections-per-user = {connections}\n{more}")
}

/// What `check` says the proxy needs at most with so many connections, in bytes.
fn need(connections: usize) -> u64 {
    let config = config(connections, "[forward]\nto = \"@nobody\"\n");
    let (code, shown, stderr) = Start::bare().args(&["check"]).config(&config).run();
    assert_eq!(code, 0, "{stderr}");
    let line = shown.lines().find_map(|line| line.strip_prefix("# up to ")).unwrap();
    line.split_once("M of memory").unwrap().0.parse::<u64>().unwrap() << 20
}

/// Under a limit of what `check` says the connections take, no more: the kernel kills where that is too little.
#[test]
fn where_neither_side_reads_the_proxy_takes_no_more_than_is_stated() {
    let number = setting("CONNECTIONS", 48);
    let taken = (need(1024 + number) - need(number)) / 1024 * number as u64;
    let group = MemoryGroup::new();
    let start = Start::bare();
    let path = start.place().path("behind");
    let behind = UnixListener::bind(&path).unwrap();
    let listener = start.place().listener("socket");
    let text = config(number + 8, &format!("[forward]\nto = \"{}\"\n", path.display()));
    let start = start.config(&text).socket("peergate@test.socket", listener);
    let wrapper = group.as_ref().map(MemoryGroup::wrapper);
    let start = if let Some(wrapper) = &wrapper { start.wrapper(wrapper) } else { start };
    let proxy = start.with_store();
    let pair = || {
        let client = proxy.connect();
        (client, Client::of(behind.accept().unwrap().0))
    };
    let (modest, served) = pair();
    let before = group.as_ref().map_or(0, MemoryGroup::usage);
    // The second process is another copy of the first for a moment.
    let limit = before + taken + (8 << 20);
    group.iter().for_each(|group| group.set_limit(limit));
    let (clients, services): (Vec<_>, Vec<_>) = (0..number).map(|_| pair()).unzip();
    let down = clog_all(&services, b"what the service sends ");
    let up = clog_all(&clients, b"what the client sends ");
    let clogged = group.as_ref().map_or(0, MemoryGroup::usage);
    let own = common::memory(&proxy, "VmHWM");
    let proxy = proxy.restart(|start, _| if let Some(wrapper) = &wrapper { start.wrapper(wrapper) } else { start });
    modest.send("after the restart");
    served.expect("after the restart");
    if let Some(group) = &group {
        let (at_rest, peak) = (clogged.saturating_sub(before), group.peak().saturating_sub(before));
        figure!(
            "{number} connections that neither side reads: {} KiB each, {} at a restart, {} stated",
            at_rest / 1024 / number as u64,
            peak / 1024 / number as u64,
            taken / 1024 / number as u64
        );
        assert_eq!(group.killed(), 0);
        assert!(peak <= limit - before, "{peak} bytes, where {taken} were stated");
    } else {
        figure!("no memory controller: the process alone took {own} KiB");
        assert!(own * 1024 < taken + (64 << 20), "{own} KiB");
    }
    // No connection was lost, no byte either.
    for index in (0..number).step_by(number / 6) {
        clients[index].half_close();
        services[index].half_close();
        services[index].expect_end(&up[index]);
        clients[index].expect_end(&down[index]);
    }
    drop((clients, services, modest, served));
    proxy.stop();
}
