// The server of Bowen's article "Using SO_PEERCRED in Go", written anew for the benchmark: one goroutine per
// connection, the peer must be the user the server runs as, a buffered line reader, and the answer as two writes
// ("> ", then the line), as Fprint to an unbuffered connection makes them. It takes descriptor 3 from LISTEN_FDS, as
// systemd passes it. Started by benches/run only; nothing of the product uses it.
package main

import (
	"bufio"
	"fmt"
	"log"
	"net"
	"os"
	"strconv"
	"syscall"
)

func main() {
	if pid, err := strconv.Atoi(os.Getenv("LISTEN_PID")); err != nil || pid != os.Getpid() || os.Getenv("LISTEN_FDS") != "1" {
		log.Fatal("one listening socket is expected as descriptor 3 (LISTEN_FDS, LISTEN_PID)")
	}
	file := os.NewFile(3, "echo.socket")
	listener, err := net.FileListener(file)
	if err != nil {
		log.Fatal(err)
	}
	file.Close()
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serve(conn.(*net.UnixConn))
	}
}

func serve(conn *net.UnixConn) {
	defer conn.Close()
	cred, err := credentials(conn)
	if err != nil {
		log.Print(err)
		return
	}
	if int(cred.Uid) != os.Getuid() {
		log.Printf("denied uid %d gid %d pid %d", cred.Uid, cred.Gid, cred.Pid)
		fmt.Fprintln(conn, "Unauthorized access")
		return
	}
	reader := bufio.NewReader(conn)
	for {
		line, err := reader.ReadString('\n')
		if err != nil {
			return
		}
		if _, err := fmt.Fprint(conn, "> "); err != nil {
			return
		}
		if _, err := fmt.Fprint(conn, line); err != nil {
			return
		}
	}
}

func credentials(conn *net.UnixConn) (*syscall.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *syscall.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	return cred, credErr
}
