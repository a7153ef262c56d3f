#!/bin/sh
# Builds and runs a fuzz target: native/fuzz/run.sh NAME [libFuzzer options]
# Example: native/fuzz/run.sh dma -max_total_time=60. Needs clang with libFuzzer.
# The corpus of the tree is native/fuzz/corpus/NAME; what is found lands in build/fuzz/NAME.
set -eu
name=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
out="$root/build/fuzz/$name"
mkdir -p "$out/corpus"
files="$root/native/fuzz/fuzz_$name.c"
for s in bus dma_desc vring_dev vring_drv vdev; do files="$files $root/native/src/$s.c"; done
# shellcheck disable=SC2086
${CLANG:-clang} -std=gnu11 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
	-fno-strict-aliasing -Wall -Wextra -I"$root/native/include" -o "$out/fuzz_$name" $files -pthread
cd "$out"
exec "./fuzz_$name" -timeout=10 -rss_limit_mb=4096 -print_final_stats=1 "$@" corpus "$root/native/fuzz/corpus/$name"
