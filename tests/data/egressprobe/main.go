// egressprobe tries to reach places from a step, and prints one line for each: "PLACE RESULT".
//
// Ways around a firewall are in attacks.go. Other places: tcp:HOST:PORT, udp:HOST:PORT, icmp:HOST,
// raw:4 (a packet socket), http:HOST:PORT/PATH, status:HOST:PORT/PATH (the status of the answer),
// take:HOST:PORT/BYTES[/SECONDS] (a stream that is timed). Through the proxy of the environment:
// via:METHOD:URL, with the URL as it is, and follow:URL, as programs do it.
package main

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"
)

const patience = 3 * time.Second

func main() {
	for _, place := range os.Args[1:] {
		fmt.Printf("%s %s\n", place, try(place))
	}
}

func try(place string) string {
	kind, target, _ := strings.Cut(place, ":")
	if result, ok := attack(kind, target); ok {
		return result
	}
	switch kind {
	case "http", "status":
		client := http.Client{Timeout: 60 * time.Second, Transport: &http.Transport{
			DialContext: (&net.Dialer{Timeout: patience}).DialContext, DisableKeepAlives: true}}
		answer, err := client.Get("http://" + target)
		if err != nil {
			return name(err)
		}
		defer answer.Body.Close()
		if kind == "status" {
			return fmt.Sprint(answer.StatusCode)
		}
		size, err := io.Copy(io.Discard, answer.Body)
		if err != nil {
			return name(err)
		}
		return fmt.Sprintf("ok %d", size)
	case "via":
		method, address, _ := strings.Cut(target, ":")
		return via(method, address)
	case "follow":
		client := http.Client{Timeout: 60 * time.Second, Transport: &http.Transport{
			Proxy: func(*http.Request) (*url.URL, error) { return url.Parse(os.Getenv("HTTP_PROXY")) }}}
		answer, err := client.Get(target)
		if err != nil {
			return name(err)
		}
		answer.Body.Close()
		return fmt.Sprint(answer.StatusCode)
	case "take":
		return take(target)
	case "tcp":
		connection, err := net.DialTimeout("tcp", target, patience)
		if err != nil {
			return name(err)
		}
		connection.Close()
		return "ok"
	case "udp":
		connection, err := net.Dial("udp", target)
		if err != nil {
			return name(err)
		}
		defer connection.Close()
		connection.SetDeadline(time.Now().Add(patience))
		// A refusal that came back is told by the next call.
		for range 3 {
			if _, err = connection.Write([]byte("hello")); err != nil {
				return name(err)
			}
			time.Sleep(50 * time.Millisecond)
		}
		if _, err = connection.Read(make([]byte, 100)); err != nil {
			return name(err)
		}
		return "ok"
	case "icmp":
		connection, err := net.Dial("ip4:icmp", target)
		if err != nil {
			return name(err)
		}
		defer connection.Close()
		connection.SetDeadline(time.Now().Add(time.Second))
		connection.Write([]byte{8, 0, 0xf7, 0xfd, 0, 1, 0, 1})
		if _, err = connection.Read(make([]byte, 100)); err != nil {
			return name(err)
		}
		return "ok"
	case "raw":
		socket, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_RAW, 0)
		if err != nil {
			return name(err)
		}
		syscall.Close(socket)
		return "ok"
	}
	return "unknown"
}

// via sends a request to the proxy byte by byte, and returns the status of the answer.
func via(method, address string) string {
	proxy, err := url.Parse(os.Getenv("HTTP_PROXY"))
	if err != nil || proxy.Host == "" {
		return "no proxy"
	}
	connection, err := net.DialTimeout("tcp", proxy.Host, patience)
	if err != nil {
		return name(err)
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(30 * time.Second))
	target := address
	if rest, found := strings.CutPrefix(address, "https://"); found {
		host, path, _ := strings.Cut(rest, "/")
		target = "/" + path
		fmt.Fprintf(connection, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", host, host)
		answer, err := http.ReadResponse(bufio.NewReader(connection), nil)
		if err != nil || answer.StatusCode != http.StatusOK {
			return fmt.Sprint("connect ", err)
		}
		connection = tls.Client(connection, &tls.Config{InsecureSkipVerify: true})
	}
	fmt.Fprintf(connection, "%s %s HTTP/1.1\r\nHost: other.example\r\nConnection: close\r\n\r\n", method, target)
	answer, err := http.ReadResponse(bufio.NewReader(connection), &http.Request{Method: method})
	if err != nil {
		return name(err)
	}
	return fmt.Sprint(answer.StatusCode)
}

func name(err error) string {
	var number syscall.Errno
	if errors.As(err, &number) {
		switch number {
		case syscall.ECONNREFUSED:
			return "refused"
		case syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EACCES:
			return "unreachable"
		case syscall.EPERM:
			return "forbidden"
		}
		return number.Error()
	}
	var late net.Error
	if errors.As(err, &late) && late.Timeout() {
		return "timeout"
	}
	return err.Error()
}
