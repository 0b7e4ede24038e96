package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/bits"
	"net"
	"runtime"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

const block = 1 << 20

// take reads a stream of HOST:PORT/BYTES[/SECONDS] to its end, and says how long it took, what the
// longest wait between two pieces was, and, where the server has to take its time, the digest.
func take(target string) string {
	address, wish, _ := strings.Cut(target, "/")
	_, pace, paced := strings.Cut(wish, "/")
	if !paced {
		pace = "0"
		useLastCore()
	}
	amount, _, _ := strings.Cut(wish, "/")
	connection, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return name(err)
	}
	defer connection.Close()
	began := time.Now()
	if _, err = fmt.Fprintf(connection, "%s %s\n", amount, pace); err != nil {
		return name(err)
	}
	digest, buffer := sha256.New(), make([]byte, block)
	var size int
	var longest time.Duration
	for last := began; ; {
		connection.SetReadDeadline(last.Add(20 * patience))
		count, err := connection.Read(buffer)
		now := time.Now()
		longest = max(longest, now.Sub(last))
		last = now
		size += count
		if paced {
			digest.Write(buffer[:count])
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return name(err)
		}
	}
	seconds := time.Since(began).Seconds()
	return fmt.Sprintf("ok %d %.6f %.6f %x", size, seconds, longest.Seconds(), digest.Sum(nil))
}

// useLastCore keeps this goroutine on the last core that the process may use. The servers of timed
// streams use the first one.
func useLastCore() {
	runtime.LockOSThread()
	var cores [16]uint64
	size := unsafe.Sizeof(cores)
	where := uintptr(unsafe.Pointer(&cores))
	if _, _, failed := syscall.RawSyscall(syscall.SYS_SCHED_GETAFFINITY, 0, size, where); failed != 0 {
		return
	}
	for word := len(cores) - 1; word >= 0; word-- {
		if cores[word] != 0 {
			last := 63 - bits.LeadingZeros64(cores[word])
			cores = [16]uint64{}
			cores[word] = 1 << last
			syscall.RawSyscall(syscall.SYS_SCHED_SETAFFINITY, 0, size, where)
			return
		}
	}
}
