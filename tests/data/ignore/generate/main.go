// Command generate records what moby/patternmatcher and fsutil, the libraries that BuildKit uses,
// make of ignore files, patterns and trees. The client's own implementation is tested against it.
//
//	go run . -seed 1 -out ../corpus.json.gz
//
// The output depends only on the seed and on the versions in go.mod.
package main

import (
	"compress/gzip"
	"encoding/json"
	"flag"
	"log"
	"math/rand"
	"os"
)

// Corpus is the recorded file.
type Corpus struct {
	Seed        int64            `json:"seed"`
	IgnoreFiles []IgnoreFileCase `json:"ignore_files"`
	Matches     []MatchCase      `json:"matches"`
	Trees       []TreeCase       `json:"trees"`
}

func main() {
	seed := flag.Int64("seed", 1, "seed of the random cases")
	out := flag.String("out", "../corpus.json.gz", "file to write")
	flag.Parse()

	random := rand.New(rand.NewSource(*seed))
	corpus := Corpus{
		Seed:        *seed,
		IgnoreFiles: ignoreFileCases(random),
		Matches:     matchCases(random),
		Trees:       treeCases(random),
	}
	file, err := os.Create(*out)
	if err != nil {
		log.Fatal(err)
	}
	// No time stamp and no name in the header, so that equal corpora are equal files.
	writer, err := gzip.NewWriterLevel(file, gzip.BestCompression)
	if err != nil {
		log.Fatal(err)
	}
	if err := json.NewEncoder(writer).Encode(corpus); err != nil {
		log.Fatal(err)
	}
	if err := writer.Close(); err != nil {
		log.Fatal(err)
	}
	if err := file.Close(); err != nil {
		log.Fatal(err)
	}
	log.Printf("%d ignore files, %d pattern sets, %d tree scans",
		len(corpus.IgnoreFiles), len(corpus.Matches), len(corpus.Trees))
}
