// A light load generator: it must take less of the machine than what it measures. Prints one JSON object.
//
//	load logins   ADDRESS USER KEY COUNT AT_ONCE
//	load echo     ADDRESS USER KEY SESSIONS SECONDS INTERVAL_MS
//	load hold     ADDRESS USER KEY SESSIONS          (prints "ready", until the end of its input)
//	load channels ADDRESS USER KEY COUNT
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"sort"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

var (
	address string
	config  *ssh.ClientConfig
)

func main() {
	address = os.Args[2]
	pem, err := os.ReadFile(os.Args[4])
	check(err)
	signer, err := ssh.ParsePrivateKey(pem)
	check(err)
	config = &ssh.ClientConfig{
		User:            os.Args[3],
		Auth:            []ssh.AuthMethod{ssh.PublicKeys(signer)},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		// Without a choice: dropbear without an RSA key ends when it is asked for one.
		HostKeyAlgorithms: []string{ssh.KeyAlgoED25519},
		Timeout:           60 * time.Second,
	}
	numbers := []int{}
	for _, text := range os.Args[5:] {
		number, err := strconv.Atoi(text)
		check(err)
		numbers = append(numbers, number)
	}
	switch os.Args[1] {
	case "logins":
		logins(numbers[0], numbers[1])
	case "echo":
		echo(numbers[0], time.Duration(numbers[1])*time.Second, time.Duration(numbers[2])*time.Millisecond)
	case "hold":
		hold(numbers[0])
	case "channels":
		channels(numbers[0])
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

var dialled uint32

// dial logs in, from ever other addresses of loopback: dropbear lets five of one address wait for a login.
func dial() *ssh.Client {
	from := net.IPv4(127, 0, 1, byte(1+atomic.AddUint32(&dialled, 1)%200))
	dialer := net.Dialer{Timeout: 60 * time.Second, LocalAddr: &net.TCPAddr{IP: from}}
	tcp, err := dialer.Dial("tcp", address)
	check(err)
	conn, channels, requests, err := ssh.NewClientConn(tcp, address, config)
	check(err)
	return ssh.NewClient(conn, channels, requests)
}

func report(facts map[string]float64, took []time.Duration) {
	if len(took) > 0 {
		sort.Slice(took, func(a, b int) bool { return took[a] < took[b] })
		facts["p50_us"] = float64(took[len(took)/2].Nanoseconds()) / 1000
		facts["p99_us"] = float64(took[len(took)*99/100].Nanoseconds()) / 1000
		facts["count"] = float64(len(took))
	}
	check(json.NewEncoder(os.Stdout).Encode(facts))
}

// logins: connect, log in, run `true` for its exit status, disconnect.
func logins(count, atOnce int) {
	tasks := make(chan int)
	took := make([]time.Duration, count)
	var workers sync.WaitGroup
	began := time.Now()
	for n := 0; n < atOnce; n++ {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for number := range tasks {
				started := time.Now()
				client := dial()
				session, err := client.NewSession()
				check(err)
				check(session.Run("true"))
				client.Close()
				took[number] = time.Since(started)
			}
		}()
	}
	for number := 0; number < count; number++ {
		tasks <- number
	}
	close(tasks)
	workers.Wait()
	report(map[string]float64{"per_second": float64(count) / time.Since(began).Seconds()}, took)
}

type typist struct {
	in  io.WriteCloser
	out io.Reader
}

// terminal starts a program on a pty, whose line discipline echoes each key; the program says nothing.
func terminal(client *ssh.Client) typist {
	session, err := client.NewSession()
	check(err)
	check(session.RequestPty("xterm", 24, 80, ssh.TerminalModes{ssh.ECHO: 1}))
	in, err := session.StdinPipe()
	check(err)
	out, err := session.StdoutPipe()
	check(err)
	check(session.Start("exec cat > /dev/null"))
	return typist{in, out}
}

func (t typist) key() time.Duration {
	answer := make([]byte, 1)
	started := time.Now()
	_, err := t.in.Write([]byte("x"))
	check(err)
	_, err = io.ReadFull(t.out, answer)
	check(err)
	if answer[0] != 'x' {
		log.Fatalf("the echo of x is %q", answer)
	}
	return time.Since(started)
}

// echo: keys typed one after the other, or by each session every interval.
func echo(sessions int, duration, interval time.Duration) {
	typists := make([]typist, sessions)
	for n := range typists {
		typists[n] = terminal(dial())
		typists[n].key()
	}
	if sessions > 1 {
		time.Sleep(time.Second) // until the last shell has started
	}
	var all []time.Duration
	var lock sync.Mutex
	var done sync.WaitGroup
	end := time.Now().Add(duration)
	for n, one := range typists {
		done.Add(1)
		go func(n int, one typist) {
			defer done.Done()
			var took []time.Duration
			time.Sleep(interval * time.Duration(n) / time.Duration(sessions))
			for keys := 0; time.Now().Before(end); keys++ {
				if keys%1000 == 999 { // a line of the terminal holds 4096
					one.in.Write([]byte("\r"))
					io.ReadFull(one.out, make([]byte, 2))
				}
				took = append(took, one.key())
				if interval > 0 {
					time.Sleep(interval)
				}
			}
			lock.Lock()
			all = append(all, took...)
			lock.Unlock()
		}(n, one)
	}
	done.Wait()
	report(map[string]float64{}, all)
}

// hold: so many connections, each with a terminal on which nothing happens.
func hold(sessions int) {
	var held []typist
	var lock sync.Mutex
	var workers sync.WaitGroup
	tasks := make(chan int)
	for n := 0; n < 4; n++ {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for range tasks {
				one := terminal(dial())
				one.key()
				lock.Lock()
				held = append(held, one)
				lock.Unlock()
			}
		}()
	}
	for n := 0; n < sessions; n++ {
		tasks <- n
	}
	close(tasks)
	workers.Wait()
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
}

// channels: so many commands on one connection, asked for at once.
func channels(count int) {
	client := dial()
	var done sync.WaitGroup
	began := time.Now()
	for n := 0; n < count; n++ {
		done.Add(1)
		go func() {
			defer done.Done()
			session, err := client.NewSession()
			check(err)
			check(session.Run("true"))
		}()
	}
	done.Wait()
	report(map[string]float64{"ms": float64(time.Since(began).Microseconds()) / 1000}, nil)
}
