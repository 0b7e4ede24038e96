// Ways around a firewall that a program in a step can try without rights.

package main

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"
)

const pause = 100 * time.Millisecond

// attack tries places of the forms KIND:ADDRESS:PORT>ARGUMENT; ok is false for other kinds.
func attack(kind, target string) (result string, ok bool) {
	where, argument, _ := strings.Cut(target, ">")
	switch kind {
	case "host":
		return askFor(where, argument, "GET / HTTP/1.1\r\nHost: "+argument+"\r\n\r\n"), true
	case "connect":
		line := "CONNECT " + argument + " HTTP/1.1\r\nHost: " + argument + "\r\n\r\n"
		return askFor(where, argument, line), true
	case "say":
		text := strings.NewReplacer(`\r`, "\r", `\n`, "\n", `\t`, "\t", "~", " ").Replace(argument)
		return askFor(where, argument, text), true
	case "tls":
		return handshake(where, argument, ""), true
	case "alerttls":
		// Servers pass over a warning, also one that comes first.
		return handshake(where, argument, "\x15\x03\x01\x00\x02\x01\x5a"), true
	case "dns", "dnstcp", "dnstxt":
		return lookUp(kind, where, argument), true
	case "rawip":
		return rawIP(where), true
	}
	return "", false
}

func askFor(where, argument, request string) string {
	connection, err := net.DialTimeout("tcp", where, patience)
	if err != nil {
		return name(err)
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(patience))
	// `\p` in a request is a pause.
	for number, part := range strings.Split(request, `\p`) {
		if number > 0 {
			time.Sleep(pause)
		}
		if _, err = io.WriteString(connection, part); err != nil {
			return name(err)
		}
	}
	answer, err := http.ReadResponse(bufio.NewReader(connection), nil)
	if err != nil {
		return name(err)
	}
	answer.Body.Close()
	return fmt.Sprintf("ok %d", answer.StatusCode)
}

func handshake(where, server, before string) string {
	connection, err := net.DialTimeout("tcp", where, patience)
	if err != nil {
		return name(err)
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(patience))
	if _, err = io.WriteString(connection, before); err != nil {
		return name(err)
	}
	client := tls.Client(connection, &tls.Config{ServerName: server, InsecureSkipVerify: true})
	if err = client.Handshake(); err == nil {
		return "ok"
	}
	if _, answered := err.(tls.RecordHeaderError); answered {
		return "ok answered"
	}
	return name(err)
}

func lookUp(kind, where, host string) string {
	network := "udp"
	if kind == "dnstcp" {
		network = "tcp"
	}
	connection, err := net.DialTimeout(network, where, patience)
	if err != nil {
		return name(err)
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(patience))
	query := []byte{0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	for _, label := range strings.Split(host, ".") {
		query = append(append(query, byte(len(label))), label...)
	}
	record := byte(1)
	if kind == "dnstxt" {
		record = 16
	}
	query = append(query, 0, 0, record, 0, 1)
	if network == "tcp" {
		query = append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)
	}
	if _, err = connection.Write(query); err != nil {
		return name(err)
	}
	answer := make([]byte, 1500)
	size, err := connection.Read(answer)
	if err != nil {
		return name(err)
	}
	if network == "tcp" {
		answer, size = answer[2:], size-2
	}
	if size < 12 {
		return "short"
	}
	return fmt.Sprintf("rcode %d answers %d", answer[3]&15, binary.BigEndian.Uint16(answer[6:]))
}

// rawIP sends a UDP datagram with a header of its own, from SOURCE/DESTINATION.
func rawIP(where string) string {
	from, to, _ := strings.Cut(where, "/")
	socket, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_RAW)
	if err != nil {
		return name(err)
	}
	defer syscall.Close(socket)
	packet := append([]byte{0x45, 0, 0, 32, 0, 1, 0, 0, 64, 17, 0, 0}, net.ParseIP(from).To4()...)
	packet = append(packet, net.ParseIP(to).To4()...)
	packet = append(packet, 0x30, 0x39, 0, 53, 0, 12, 0, 0, 'l', 'e', 'a', 'k')
	address := &syscall.SockaddrInet4{}
	copy(address.Addr[:], net.ParseIP(to).To4())
	if err = syscall.Sendto(socket, packet, 0, address); err != nil {
		return name(err)
	}
	return "sent"
}
