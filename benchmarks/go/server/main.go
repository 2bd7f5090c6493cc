// The SSH shell server that people write with golang.org/x/crypto/ssh: accept, handshake, bash on a pty or on
// pipes, copies both ways. It closes when the program ends, and leaves its shells behind when the client goes.
package main

import (
	"encoding/binary"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"github.com/creack/pty"
	"golang.org/x/crypto/ssh"
)

func main() {
	pem, err := os.ReadFile(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	signer, err := ssh.ParsePrivateKey(pem)
	if err != nil {
		log.Fatal(err)
	}
	text, err := os.ReadFile(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	allowed, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		log.Fatal(err)
	}
	config := &ssh.ServerConfig{
		PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if string(key.Marshal()) != string(allowed.Marshal()) {
				return nil, io.EOF
			}
			return nil, nil
		},
	}
	config.AddHostKey(signer)
	listener, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	for {
		tcp, err := listener.Accept()
		if err != nil {
			continue
		}
		go serve(tcp, config)
	}
}

func serve(tcp net.Conn, config *ssh.ServerConfig) {
	_, channels, requests, err := ssh.NewServerConn(tcp, config)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(requests)
	for offered := range channels {
		if offered.ChannelType() != "session" {
			offered.Reject(ssh.UnknownChannelType, "unknown channel type")
			continue
		}
		channel, requests, err := offered.Accept()
		if err == nil {
			go session(channel, requests)
		}
	}
}

func session(channel ssh.Channel, requests <-chan *ssh.Request) {
	var master, slave *os.File
	for request := range requests {
		switch request.Type {
		case "pty-req":
			var err error
			master, slave, err = pty.Open()
			if err == nil {
				size := request.Payload[4+binary.BigEndian.Uint32(request.Payload):]
				pty.Setsize(master, &pty.Winsize{Cols: uint16(binary.BigEndian.Uint32(size)), Rows: uint16(binary.BigEndian.Uint32(size[4:]))})
			}
			request.Reply(err == nil, nil)
		case "window-change":
			if master != nil {
				pty.Setsize(master, &pty.Winsize{Cols: uint16(binary.BigEndian.Uint32(request.Payload)), Rows: uint16(binary.BigEndian.Uint32(request.Payload[4:]))})
			}
		case "shell", "exec":
			command := exec.Command("/bin/bash", "-l")
			if request.Type == "exec" {
				command = exec.Command("/bin/bash", "-c", string(request.Payload[4:]))
			}
			request.Reply(true, nil)
			go run(channel, command, master, slave)
		default:
			request.Reply(false, nil)
		}
	}
}

func run(channel ssh.Channel, command *exec.Cmd, master, slave *os.File) {
	var copies sync.WaitGroup
	if master != nil {
		command.Stdin, command.Stdout, command.Stderr = slave, slave, slave
		command.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		if command.Start() != nil {
			channel.Close()
			return
		}
		slave.Close()
		copies.Add(1)
		go func() { io.Copy(channel, master); copies.Done() }()
		go io.Copy(master, channel)
	} else {
		stdin, _ := command.StdinPipe()
		stdout, _ := command.StdoutPipe()
		stderr, _ := command.StderrPipe()
		if command.Start() != nil {
			channel.Close()
			return
		}
		copies.Add(2)
		go func() { io.Copy(channel, stdout); copies.Done() }()
		go func() { io.Copy(channel.Stderr(), stderr); copies.Done() }()
		go func() { io.Copy(stdin, channel); stdin.Close() }()
	}
	copies.Wait()
	command.Wait()
	if master != nil {
		master.Close()
	}
	status := make([]byte, 4)
	binary.BigEndian.PutUint32(status, uint32(command.ProcessState.ExitCode()))
	channel.SendRequest("exit-status", false, status)
	channel.Close()
}
