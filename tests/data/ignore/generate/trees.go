package main

import (
	"context"
	"fmt"
	gofs "io/fs"
	"log"
	"math/rand"
	"os"
	"path/filepath"
	"strings"

	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
)

// Node is an entry of a tree: a directory, a file with a size, a symbolic link (Target), a hard
// link (Link) or a named pipe.
type Node struct {
	Path   string `json:"path"`
	Kind   string `json:"kind"`
	Mode   uint32 `json:"mode,omitempty"`
	Size   int64  `json:"size,omitempty"`
	Target string `json:"target,omitempty"`
}

// Entry is what fsutil sends for a path.
type Entry struct {
	Path string `json:"path"`
	Mode uint32 `json:"mode"`
	Size int64  `json:"size,omitempty"`
	Link string `json:"link,omitempty"`
}

// TreeCase is a tree, the patterns of a request, the patterns that follow links yields (null: no
// filter at all), and the entries that the sender would announce.
type TreeCase struct {
	Tree     []Node   `json:"tree,omitempty"`
	Same     bool     `json:"same_tree,omitempty"`
	Include  []string `json:"include,omitempty"`
	Exclude  []string `json:"exclude,omitempty"`
	Follow   []string `json:"follow,omitempty"`
	Followed []string `json:"followed"`
	Failed   bool     `json:"failed,omitempty"`
	Entries  []Entry  `json:"entries,omitempty"`
}

// shortcutTree and shortcuts are requests on which fsutil's shortcut for plain patterns shows: it
// skips directories although a pattern would match below them.
var shortcutTree = []Node{
	{Path: "a", Kind: "dir", Mode: 0o755},
	{Path: "a/x", Kind: "file", Mode: 0o644},
	{Path: "b", Kind: "dir", Mode: 0o755},
	{Path: "b/a", Kind: "file", Mode: 0o644},
	{Path: "b/d", Kind: "dir", Mode: 0o755},
	{Path: "b/d/e", Kind: "dir", Mode: 0o755},
	{Path: "b/d/e/f", Kind: "file", Mode: 0o644},
}

var shortcuts = []TreeCase{
	{Exclude: []string{"b", "!a|b/*"}},
	{Exclude: []string{"b", "!a|b/*", "!*/q"}},
	{Exclude: []string{"b", "!a|b*"}},
	{Exclude: []string{"b", "!bb{0}/*"}},
	{Exclude: []string{"b", "!bb{0}/*", "!*/q"}},
	{Exclude: []string{"b/d", "!b/*/**"}},
	{Exclude: []string{"b/d", "!b/*/**", "!*/q"}},
	{Exclude: []string{"b", "!b/d/**"}},
	{Exclude: []string{"b", "!b/d/*"}},
	{Exclude: []string{"*", "!b/d/e"}},
	{Exclude: []string{"!b/d", "b"}},
	{Include: []string{"b/*/**"}},
	{Include: []string{"b/*/**", "*/q"}},
	{Include: []string{"a|b/*"}},
	{Include: []string{"a|b/*", "*/q"}},
	{Include: []string{"bb{0}/*"}},
	{Include: []string{"bb{0}/*", "*/q"}},
	{Include: []string{"b/d/*", "!b/d/e"}},
	{Include: []string{"b", "!b/d"}},
}

func shortcutCases() []TreeCase {
	root := build(shortcutTree)
	defer os.RemoveAll(root)
	cases := []TreeCase{{Tree: shortcutTree}}
	cases = append(cases, shortcuts...)
	for i := range cases {
		cases[i].Same = i > 0
		record(root, &cases[i])
	}
	return cases
}

func treeCases(random *rand.Rand) []TreeCase {
	cases := shortcutCases()
	for range 60 {
		tree := randomTree(random)
		root := build(tree)
		for number := range 25 {
			request := TreeCase{Same: number > 0}
			if number == 0 {
				request.Tree = tree
			} else {
				request.Include = randomPatterns(random, tree, 4, false)
				request.Exclude = randomPatterns(random, tree, 2, true)
				request.Follow = randomPatterns(random, tree, 2, false)
			}
			record(root, &request)
			cases = append(cases, request)
		}
		if err := os.RemoveAll(root); err != nil {
			log.Fatal(err)
		}
	}
	return cases
}

func record(root string, request *TreeCase) {
	base, err := fsutil.NewFS(root)
	if err != nil {
		log.Fatal(err)
	}
	if request.Follow != nil {
		if request.Followed, err = fsutil.FollowLinks(base, request.Follow); err != nil {
			request.Failed = true
			return
		}
	}
	filtered, err := fsutil.NewFilterFS(base, &fsutil.FilterOpt{
		IncludePatterns: request.Include,
		ExcludePatterns: request.Exclude,
		FollowPaths:     request.Follow,
	})
	if err != nil {
		request.Failed = true
		return
	}
	err = fsutil.WithHardlinkReset(filtered).Walk(context.Background(), "/",
		func(path string, entry gofs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := entry.Info()
			if err != nil {
				return err
			}
			stat := info.Sys().(*types.Stat)
			request.Entries = append(request.Entries,
				Entry{stat.Path, stat.Mode, stat.Size, stat.Linkname})
			return nil
		})
	if err != nil {
		request.Failed, request.Entries = true, nil
	}
}

var elements = []string{"a", "b", "ab", "a.b", "a-b", "a b", "A", "é", "z", "a!", "x", "[a]", "a*"}

func randomTree(random *rand.Rand) []Node {
	kinds := map[string]string{}
	var directories, files []string
	var nodes []Node
	directories = append(directories, "")
	for range 6 + random.Intn(22) {
		parent := directories[random.Intn(len(directories))]
		path := filepath.Join(parent, elements[random.Intn(len(elements))])
		if kinds[path] != "" {
			continue
		}
		node := Node{Path: path}
		switch choice := random.Intn(12); {
		case choice < 5:
			node.Kind, node.Mode = "dir", []uint32{0o755, 0o700, 0o775}[random.Intn(3)]
			directories = append(directories, path)
		case choice < 9:
			node.Kind, node.Size = "file", int64(random.Intn(4000))
			node.Mode = []uint32{0o644, 0o600, 0o755, 0o664}[random.Intn(4)]
			files = append(files, path)
		case choice < 10 && len(files) > 0:
			node.Kind, node.Target = "link", files[random.Intn(len(files))]
		case choice < 11:
			node.Kind, node.Target = "symlink", randomTarget(random)
		default:
			node.Kind, node.Mode = "fifo", 0o644
		}
		kinds[path] = node.Kind
		nodes = append(nodes, node)
	}
	return nodes
}

func randomTarget(random *rand.Rand) string {
	parts := make([]string, 1+random.Intn(3))
	for i := range parts {
		parts[i] = append(elements, "..", "..", ".")[random.Intn(len(elements)+3)]
	}
	target := strings.Join(parts, "/")
	if random.Intn(4) == 0 {
		target = "/" + target
	}
	return target
}

func randomPatterns(random *rand.Rand, tree []Node, rarity int, exceptions bool) []string {
	if random.Intn(rarity) != 0 {
		return nil
	}
	patterns := make([]string, 1+random.Intn(4))
	for i := range patterns {
		pattern := elements[random.Intn(len(elements))]
		if len(tree) > 0 && random.Intn(3) > 0 {
			pattern = tree[random.Intn(len(tree))].Path
		}
		parts := strings.Split(pattern, "/")
		if random.Intn(3) == 0 {
			parts[random.Intn(len(parts))] = []string{"*", "a*", "?", "[ab]*", "**", "*b"}[random.Intn(6)]
		}
		pattern = strings.Join(parts, "/")
		pattern += []string{"", "", "", "/*", "/**", "/*/**", "/b", "/.."}[random.Intn(8)]
		if random.Intn(12) == 0 {
			pattern = []string{".", "/", "../a", "**", "*", "a|b", "a|b/*", "aa{0}/*", "a{1}/**"}[random.Intn(9)]
		}
		if exceptions && random.Intn(3) == 0 || random.Intn(20) == 0 {
			pattern = "!" + pattern
		}
		patterns[i] = pattern
	}
	return patterns
}

// build makes the tree in a temporary directory. Nodes come after their parents.
func build(tree []Node) string {
	root, err := os.MkdirTemp("", "tree")
	if err != nil {
		log.Fatal(err)
	}
	for _, node := range tree {
		if err := makeNode(root, node); err != nil {
			log.Fatal(fmt.Errorf("%s: %w", node.Path, err))
		}
	}
	return root
}
