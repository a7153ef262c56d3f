#!/bin/sh
# Builds and runs the libFuzzer targets: native/fuzz/run.sh [SECONDS [TARGET ...]]
# Default: every fuzz_*.c, 60 seconds each. Needs clang with libFuzzer. The corpus of the tree is
# native/fuzz/corpus/TARGET; what a run adds, and what it finds, lands in build/fuzz/TARGET.
set -eu
seconds=${1:-60}
[ $# -gt 0 ] && shift
root=$(cd "$(dirname "$0")/../.." && pwd)
command -v "${CLANG:-clang}" >/dev/null || { echo "native/fuzz/run.sh: clang is missing" >&2; exit 1; }
if [ $# -eq 0 ]; then
	for f in "$root"/native/fuzz/fuzz_*.c; do
		name=${f##*/fuzz_}
		set -- "$@" "${name%.c}"
	done
fi
for name in "$@"; do
	out="$root/build/fuzz/$name"
	mkdir -p "$out/corpus"
	"${CLANG:-clang}" -std=gnu11 -g -O1 -fsanitize=fuzzer,address,undefined \
		-fno-sanitize-recover=undefined -fno-strict-aliasing -Wall -Wextra -I"$root/native/include" \
		-o "$out/fuzz" "$root/native/fuzz/fuzz_$name.c" "$root"/native/src/*.c -pthread
	echo "== fuzz $name, $seconds s"
	(cd "$out" && ./fuzz -max_total_time="$seconds" -timeout=10 -rss_limit_mb=4096 -verbosity=0 \
		-print_final_stats=1 corpus "$root/native/fuzz/corpus/$name")
done
