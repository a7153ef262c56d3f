#!/bin/sh
# Builds and runs the libFuzzer targets: native/fuzz/run.sh [SECONDS [TARGET ...]]
# Default: every fuzz_*.c, 60 seconds each. Needs clang with libFuzzer. The corpus of the tree is
# native/fuzz/corpus/TARGET; what a run adds, and what it finds, lands in build/fuzz/TARGET.
set -eu
seconds=${1:-60}
[ $# -gt 0 ] && shift
root=$(cd "$(dirname "$0")/../.." && pwd)
clang=${CLANG:-clang}
command -v "$clang" >/dev/null || { echo "native/fuzz/run.sh: clang is missing" >&2; exit 1; }
if [ $# -eq 0 ]; then
	for f in "$root"/native/fuzz/fuzz_*.c; do
		name=${f##*/fuzz_}
		set -- "$@" "${name%.c}"
	done
fi
flags="-std=gnu11 -g -O1 -fno-sanitize-recover=undefined -fno-strict-aliasing -Wall -Wextra -I$root/native/include"
objects="$root/build/fuzz/objects"
mkdir -p "$objects"
for f in "$root"/native/src/*.c; do # once for all targets, again after any change
	name=${f##*/}
	object="$objects/${name%.c}.o"
	[ -e "$object" ] && [ -z "$(find "$root/native/src" "$root/native/include" -name '*.[ch]' -newer "$object")" ] && continue
	$clang $flags -fsanitize=fuzzer-no-link,address,undefined -c -o "$object.new" "$f" && mv "$object.new" "$object"
done
for name in "$@"; do
	out="$root/build/fuzz/$name"
	mkdir -p "$out/corpus"
	$clang $flags -fsanitize=fuzzer,address,undefined -o "$out/fuzz" "$root/native/fuzz/fuzz_$name.c" "$objects"/*.o -pthread
	echo "== fuzz $name, $seconds s"
	(cd "$out" && ./fuzz -max_total_time="$seconds" -timeout=10 -rss_limit_mb=4096 -verbosity=0 \
		-print_final_stats=1 corpus "$root/native/fuzz/corpus/$name")
done
