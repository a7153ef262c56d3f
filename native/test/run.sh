#!/bin/sh
# Builds and runs the C tests: native/test/run.sh [plain|asan|tsan] [program ...]
# CC chooses the compiler. Exit status 0: every test of every program passed.
set -eu
kind=${1:-plain}
[ $# -gt 0 ] && shift
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
case $kind in
plain) flags="-O2" ;;
asan) flags="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" ;;
# TSan does not model fences; what they order is also ordered by atomic accesses.
tsan) flags="-O1 -fsanitize=thread -Wno-unknown-warning-option -Wno-tsan" ;;
*) echo "usage: $0 [plain|asan|tsan] [program ...]" >&2; exit 2 ;;
esac
export TSAN_OPTIONS="halt_on_error=1 ${TSAN_OPTIONS:-}"
status=0
[ $# -gt 0 ] || set -- "$root"/native/test/test_*.c
build="${CC:-cc} -std=gnu11 -g $flags -Wall -Wextra -Wshadow -fno-omit-frame-pointer -fno-strict-aliasing -I$root/native/include"
# Everything once, then a link per program.
(cd "$out" && printf '%s\n' "$root"/native/src/*.c | xargs -P "$(nproc)" -n 1 $build -c)
ar rcs "$out/libmic.a" "$out"/*.o
for test in "$@"; do
	name=$(basename "$test" .c)
	# shellcheck disable=SC2086
	$build -o "$out/$name" "$root/native/test/$name.c" "$out/libmic.a" -pthread
	echo "== $name ($kind)"
	timeout 600 "$out/$name" || { echo "== $name: exit status $?"; status=1; }
done
exit $status
