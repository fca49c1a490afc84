//! The gate's thread: drives the gate, gives each admitted connection its first turn, and does what the main thread asks.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use peergate::Wakeup;
use peergate::activation::Listener;
use peergate::gate::{Admission, Closer, Gate, GateConfig};
use peergate::systemd::{Heartbeat, Monitored};

use crate::first_turn::FirstTurn;
use crate::protocol::Protocol;
use crate::terms::Terms;

/// The running thread, as the main thread sees it.
pub struct GateThread<P: Protocol> {
    commands: mpsc::Sender<Command<P>>,
    closer: Closer,
    heartbeat: Arc<Heartbeat>,
    thread: Option<thread::JoinHandle<Vec<Listener>>>,
}

/// What the thread is asked to do. A sender that is dropped unanswered tells the main thread that the thread has ended.
enum Command<P: Protocol> {
    Configure(GateConfig<Terms<P>>, P::Settings, mpsc::Sender<()>),
    /// The answer: the number that the next connection will have.
    StopAccepting(mpsc::Sender<u64>),
    ShutIfQuiet(mpsc::Sender<bool>),
    Shut,
}

impl<P: Protocol> GateThread<P> {
    /// Starts the thread. `wakeup` hears of each connection that is judged.
    ///
    /// # Errors
    /// What starting a thread says.
    pub fn start(gate: Gate<Terms<P>>, first_turn: FirstTurn<P>, wakeup: Arc<Wakeup>) -> io::Result<Self> {
        let (commands, received) = mpsc::channel();
        let (closer, heartbeat) = (gate.closer(), Arc::new(Heartbeat::default()));
        let mut running = GateLoop { gate, first_turn, commands: received, wakeup, heartbeat: Arc::clone(&heartbeat) };
        let thread = thread::Builder::new().name("gate".to_owned()).spawn(move || {
            running.run();
            running.gate.finish()
        })?;
        Ok(Self { commands, closer, heartbeat, thread: Some(thread) })
    }

    /// Puts a configuration in force. When it returns, every connection that an earlier one admitted is in a worker's mailbox.
    pub fn configure(&self, config: GateConfig<Terms<P>>, settings: P::Settings) {
        self.ask(|answer| Command::Configure(config, settings, answer));
    }

    /// Accepts no connection from now on; every admitted one is in a worker's hands. Returns the number that the next
    /// connection would have.
    pub fn stop_accepting(&self) -> u64 {
        self.ask(Command::StopAccepting).unwrap_or_default()
    }

    /// Shuts the gate if no connection is admitted or being closed.
    pub fn shut_if_quiet(&mut self) -> bool {
        let is_quiet = self.ask(Command::ShutIfQuiet).unwrap_or(true);
        if is_quiet {
            self.join();
        }
        is_quiet
    }

    /// Closes in order what is being closed, and hands the listeners back.
    pub fn shut(&mut self) -> Vec<Listener> {
        let _ = self.commands.send(Command::Shut);
        self.closer.wake();
        self.join()
    }

    /// For the watchdog.
    pub fn monitored(&self) -> Monitored {
        let closer = self.closer.clone();
        Monitored::new("gate", &self.heartbeat, move || closer.wake())
    }

    fn ask<A>(&self, command: impl FnOnce(mpsc::Sender<A>) -> Command<P>) -> Option<A> {
        let (answer, answered) = mpsc::channel();
        self.commands.send(command(answer)).ok()?;
        self.closer.wake();
        answered.recv().ok()
    }

    fn join(&mut self) -> Vec<Listener> {
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

struct GateLoop<P: Protocol> {
    gate: Gate<Terms<P>>,
    first_turn: FirstTurn<P>,
    commands: mpsc::Receiver<Command<P>>,
    wakeup: Arc<Wakeup>,
    heartbeat: Arc<Heartbeat>,
}

impl<P: Protocol> GateLoop<P> {
    fn run(&mut self) {
        let mut admitted = Vec::new();
        loop {
            self.heartbeat.answer();
            // While connections come close together, looking again costs less than sleeping.
            let timeout = self.first_turn.goes_on_looking().then_some(Duration::ZERO);
            if self.gate.turn(timeout, &mut admitted) {
                self.wakeup.notify();
            }
            self.serve(&mut admitted);
            while let Ok(command) = self.commands.try_recv() {
                if self.is_last(command, &mut admitted) {
                    return;
                }
            }
        }
    }

    fn serve(&mut self, admitted: &mut Vec<Admission<Terms<P>>>) {
        admitted.drain(..).for_each(|admission| self.first_turn.admit(admission));
    }

    /// Obeys a command. True where it ends the thread.
    fn is_last(&mut self, command: Command<P>, admitted: &mut Vec<Admission<Terms<P>>>) -> bool {
        match command {
            Command::Configure(config, settings, answer) => {
                self.first_turn.give_all();
                self.first_turn.settings = settings;
                self.gate.set_config(config);
                let _ = answer.send(());
            }
            Command::StopAccepting(answer) => {
                self.stop_accepting(admitted);
                let _ = answer.send(self.gate.next_connection());
            }
            Command::ShutIfQuiet(answer) => {
                let is_quiet = self.gate.is_quiet();
                return answer.send(is_quiet).is_ok() && is_quiet;
            }
            Command::Shut => {
                self.stop_accepting(admitted);
                return true;
            }
        }
        false
    }

    fn stop_accepting(&mut self, admitted: &mut Vec<Admission<Terms<P>>>) {
        // A connection that came before the command is not left in the queue: of our own listeners it goes with them.
        self.gate.turn(Some(Duration::ZERO), admitted);
        self.serve(admitted);
        self.gate.stop_accepting(admitted);
        self.serve(admitted);
        self.first_turn.give_all_and_end();
    }
}
