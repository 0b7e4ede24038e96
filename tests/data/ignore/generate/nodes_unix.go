package main

import (
	"os"
	"path/filepath"
	"syscall"
)

func makeNode(root string, node Node) error {
	path := filepath.Join(root, node.Path)
	switch node.Kind {
	case "dir":
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
	case "file":
		if err := os.WriteFile(path, make([]byte, node.Size), 0o644); err != nil {
			return err
		}
	case "link":
		return os.Link(filepath.Join(root, node.Target), path)
	case "symlink":
		return os.Symlink(node.Target, path)
	case "fifo":
		if err := syscall.Mkfifo(path, 0o644); err != nil {
			return err
		}
	}
	return os.Chmod(path, os.FileMode(node.Mode))
}
