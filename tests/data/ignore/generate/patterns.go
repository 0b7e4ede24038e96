package main

import (
	"bytes"
	"math/rand"
	"strings"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

// IgnoreFileCase is the text of an ignore file and what the reader returns.
type IgnoreFileCase struct {
	Text     []byte   `json:"text"`
	Patterns []string `json:"patterns"`
	Failed   bool     `json:"failed,omitempty"`
}

// MatchCase is a list of patterns and the verdict on each path: "1" matched, "0" not matched,
// "E" an error. Walked holds the verdicts of a tree walk, which passes the parent's result on.
type MatchCase struct {
	Patterns []string `json:"patterns"`
	Refused  bool     `json:"refused,omitempty"`
	Paths    []string `json:"paths,omitempty"`
	Verdicts string   `json:"verdicts,omitempty"`
	Walked   string   `json:"walked,omitempty"`
}

func ignoreFileCases(random *rand.Rand) []IgnoreFileCase {
	texts := []string{
		"", "\n", "a", "a\r\nb\r\n", "# comment\na", " # no comment", "\ufeffa\nb", "\ufeff# c\na",
		"a\n\ufeffb", "  a  \n\t!b\t", "! b", "!", "! ", "!!a", "/a", "!/a", "//a//b/", "/", "!/", "..",
		"../a", "a/../b", "!a/../b", "./a", "a/.", "a//b", "a/./b/../c", "\u00a0a\u00a0", "\u3000a",
		"\x1ca", "a\x00b", "a\u2028b", "*.go\n!main.go", "\\#a", "a\\ ", "**/x\n!**/x/y", "a\rb", "\r\n\r\n",
		"é", "\ufeff\ufeffa", strings.Repeat("a", 65535), strings.Repeat("a", 65536),
		strings.Repeat("a", 65535) + "\nb", "b\n" + strings.Repeat("a", 70000) + "\nc",
		strings.Repeat("a", 65534) + "\r\nb", "\ufeff" + strings.Repeat("a", 65533),
		"\ufeff" + strings.Repeat("a", 65532),
	}
	pieces := []string{"a", "b", "*", "**", "/", "//", ".", "..", "!", "#", " ", "\t", "\r", "\n", "\n",
		"\u00a0", "\ufeff", "\\", "[a]", "é", "\v", "\f", "\x1f", "\u0085"}
	for range 1500 {
		texts = append(texts, join(random, pieces, 14))
	}
	cases := make([]IgnoreFileCase, 0, len(texts))
	for _, text := range texts {
		patterns, err := ignorefile.ReadAll(bytes.NewBufferString(text))
		if err != nil {
			patterns = nil
		}
		cases = append(cases, IgnoreFileCase{[]byte(text), patterns, err != nil})
	}
	return cases
}

// Alphabets of pattern pieces: everyday ones, ones that reach moby's shortcuts, and ones through
// which Go's regular expression syntax shows.
var alphabets = [][]string{
	{"a", "b", "ab", "/", "/", "*", "**", "?", ".", "!"},
	{"a", "b", "x", "/", "**", "**/", "/**", "*", "a/b", "b/x"},
	{"a", "b", "[ab]", "[^a]", "[a-c]", "[!a]", "[", "]", "-", "^", "*", "/", "\\", "**", "[z-a]"},
	{"a", "b", "{2}", "{", "}", "|", "(", ")", "+", "$", ".", "^", "*", "/", "{0}", "{1,}", "[a|]", "{,2}"},
	{"a", "1", "\\d", "\\w", "\\S", "\\b", "\\Q", "\\E", "\\x61", "\\141", "\\1", "\\z", "\\A", "\\pL", "\\PL",
		"\\q", "\\.", "\\*", "[[:alpha:]]", "[[:^alpha:]]", "[[:no:]]", "[\\d]", "[\\w-]", "*", "/", "\\n", "[\\]]"},
	{"é", "ü", "\ufeff", "a", " ", "\n", "*", "**", "?", "[é-ü]", "/", "\u00a0", "\ufffd", "日本"},
}

var fixedPatterns = [][]string{
	{}, {""}, {" "}, {"."}, {"/"}, {"!"}, {"!", "a"}, {"/a"}, {".."}, {"**"}, {"*"}, {"**/"}, {"***"}, {"****"},
	{"*", "!a"}, {"*", "!a/b"}, {"a", "!a/b"}, {"a/b", "!a"}, {"!a", "a"}, {"**/a", "!b/a"}, {"**b"}, {"**/b"},
	{"a**"}, {"a/**"}, {"a/**/b"}, {"**a**"}, {"*/*/**"}, {"a/*/**"}, {"b", "!a/*/**"}, {"!a/../b"}, {"b", "!./b"},
	{"a|b*"}, {"|*"}, {"a{2}*"}, {"{2}*"}, {"a{1001}*"}, {"a{3,2}*"}, {"a{02}*"}, {"**{2}"}, {"[a]{2}"}, {"a*{2}"},
	{"[z-a]"}, {"a", "[z-a]"}, {"[z-a]", "a"}, {"a", "!b", "[z-a]"}, {"[]a]"}, {"[^]"}, {"[a-]"}, {"[-a]"}, {"[]"},
	{"[a"}, {"a\\"}, {"\\"}, {"[\\"}, {"[a*]"}, {"[*"}, {"[**/]"}, {"[?]"}, {"x[a*b]y"}, {"[[]*]"}, {"^a"}, {"a^*"},
	{"node_modules", "**/*.pyc", "!**/keep.pyc", ".git"}, {"a b*"}, {"$*"}, {"*$"}, {"a.b*"}, {"*.{js,ts}"},
}

func matchCases(random *rand.Rand) []MatchCase {
	var cases []MatchCase
	for _, patterns := range fixedPatterns {
		cases = append(cases, matchCase(random, patterns, 0, 60))
	}
	for index := range 4200 {
		alphabet := index % len(alphabets)
		patterns := make([]string, 1+random.Intn(5))
		for i := range patterns {
			if random.Intn(3) == 0 {
				patterns[i] = "!"
			}
			patterns[i] += join(random, alphabets[alphabet], 6)
		}
		cases = append(cases, matchCase(random, patterns, alphabet, 18))
	}
	return cases
}

func matchCase(random *rand.Rand, patterns []string, alphabet, count int) MatchCase {
	matcher, err := patternmatcher.New(patterns)
	if err != nil {
		return MatchCase{Patterns: patterns, Refused: true}
	}
	paths := randomPaths(random, alphabet, count)
	var verdicts, walked strings.Builder
	for _, path := range paths {
		matched, err := matcher.MatchesOrParentMatches(path)
		verdicts.WriteString(verdict(matched, err))
		matched, err = walk(matcher, path)
		walked.WriteString(verdict(matched, err))
	}
	return MatchCase{patterns, false, paths, verdicts.String(), walked.String()}
}

// walk visits the parents of a path and then the path.
func walk(matcher *patternmatcher.PatternMatcher, path string) (bool, error) {
	var info patternmatcher.MatchInfo
	var matched bool
	parts := strings.Split(path, "/")
	for i := range parts {
		var err error
		matched, info, err = matcher.MatchesUsingParentResults(strings.Join(parts[:i+1], "/"), info)
		if err != nil {
			return false, err
		}
	}
	return matched, nil
}

func verdict(matched bool, err error) string {
	switch {
	case err != nil:
		return "E"
	case matched:
		return "1"
	default:
		return "0"
	}
}

var names = [][]string{
	{"a", "b", "ab", "ba", "a.b", ".a", "aa", "x"},
	{"a", "b", "x", "ab", "xb", "ax"},
	{"a", "b", "c", "z", "-", "^", "]", "[", "!", "\\", "ab", "a-b"},
	{"a", "b", "aa", "aab", "a|b", "{", "}", "a{2}", "$", "a$b", "(a)", "a+", "|", "ab"},
	{"a", "1", "A", "a1", "_", " ", "d", "w", "Q", "x61", ".", "*", "a.b", "\\", "]", "-", "a\n", "é", "pL", "z", "E"},
	{"é", "ü", "a", " ", "a b", "\n", "ö", "日本", "a\u00a0", "\ufffd", "日", "é a"},
}

func randomPaths(random *rand.Rand, alphabet, count int) []string {
	seen := map[string]bool{}
	var paths []string
	for range count {
		parts := make([]string, 1+random.Intn(4))
		for i := range parts {
			parts[i] = names[alphabet][random.Intn(len(names[alphabet]))]
			if parts[i] == "." {
				parts[i] = "dot"
			}
		}
		path := strings.Join(parts, "/")
		if !seen[path] {
			seen[path] = true
			paths = append(paths, path)
		}
	}
	return paths
}

func join(random *rand.Rand, pieces []string, most int) string {
	var text strings.Builder
	for range 1 + random.Intn(most) {
		text.WriteString(pieces[random.Intn(len(pieces))])
	}
	return text.String()
}
