#!/bin/sh
# Strict compile of all C, and cppcheck when it is there.
set -eu
cd "$(dirname "$0")/.."
for f in native/src/*.c native/libscif/*.c native/libmicvop/*.c native/bench/*.c; do
	gcc -std=gnu11 -O2 -fsyntax-only -Inative/include -Inative/libscif -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Werror "$f"
done
# Suppressed: checks that do not see through our out-parameters; gcc's -Wmaybe-uninitialized does.
if command -v cppcheck >/dev/null 2>&1; then
	cppcheck -q --std=c11 --error-exitcode=1 --inline-suppr --suppress=missingIncludeSystem \
		--suppress=uninitvar --suppress=ctuuninitvar --suppress=nullPointerRedundantCheck \
		--enable=warning,portability -Inative/include -Inative/libscif native/src native/libscif native/libmicvop native/bench
fi
