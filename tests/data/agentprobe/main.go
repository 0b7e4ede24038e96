// Agentprobe sends messages, given in hexadecimal, to the SSH agent of its environment and prints
// the replies. It runs in build steps that have nothing but this program.
package main

import (
	"encoding/hex"
	"fmt"
	"os"
	"syscall"
)

func main() {
	socket, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		err = syscall.Connect(socket, &syscall.SockaddrUnix{Name: os.Getenv("SSH_AUTH_SOCK")})
	}
	if err != nil {
		fmt.Println("no agent:", err)
		os.Exit(3)
	}
	for _, text := range os.Args[1:] {
		request, err := hex.DecodeString(text)
		if err != nil {
			panic(err)
		}
		if _, err := syscall.Write(socket, request); err != nil {
			fmt.Println("reply closed")
			os.Exit(4)
		}
		head := read(socket, 4)
		size := int(head[0])<<24 | int(head[1])<<16 | int(head[2])<<8 | int(head[3])
		fmt.Println("reply", hex.EncodeToString(read(socket, size)))
	}
}

func read(socket, size int) []byte {
	data := make([]byte, 0, size)
	for len(data) < size {
		piece := make([]byte, size-len(data))
		count, err := syscall.Read(socket, piece)
		if err != nil || count <= 0 {
			fmt.Println("reply closed")
			os.Exit(4)
		}
		data = append(data, piece[:count]...)
	}
	return data
}
