#!/bin/sh
# Turns the texts below $1 into pages below $2; slow enough to be worth caching.
set -e
mkdir -p "$2/posts"
number=1
while [ $number -le 40 ]; do
  {
    echo "<!doctype html><title>Post $number</title>"
    sed "s/NUMBER/$number/g" "$1/post.html"
    i=0
    while [ $i -lt 200 ]; do echo "<p>Paragraph $i of post $number.</p>"; i=$((i + 1)); done
  } > "$2/posts/$number.html"
  number=$((number + 1))
done
echo "made $((number - 1)) posts"
cp "$1/index.html" "$2/index.html"
du -s "$2" | cut -f1 | sed 's/$/ KiB in all/'
