#!/bin/sh
# The C code under sanitizers: native/sanitize.sh address,undefined | thread
#
# First the C tests. Then, for address,undefined, the Python tests that drive C most (rings, DMA,
# registers) with a module built the same way, in a copy of the tree under build/: the module in
# .venv stays as it is. Python itself is not instrumented, so leaks are not looked for there.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
kind=${1:?address,undefined or thread}
case $kind in
address,undefined) sh "$root/native/test/run.sh" asan ;;
thread) exec sh "$root/native/test/run.sh" tsan ;;
*) echo "usage: $0 address,undefined|thread" >&2; exit 2 ;;
esac
python="$root/.venv/bin/python"
farm="$root/build/sanitize"
rm -rf "$farm"
mkdir -p "$farm"
cp -r "$root/mic_emu" "$root/native" "$root/tests" "$root/pyproject.toml" "$farm"
rm -f "$farm"/mic_emu/*.so
cp -r "$root/host" "$farm/mic_emu/host"
cp -r "$root/card" "$farm/mic_emu/card"
cat >"$farm/build.py" <<'PY'
from setuptools import Distribution

dist = Distribution({"name": "sanitized", "packages": ["mic_emu"], "cffi_modules": ["native/build_native.py:ffi"]})
build = dist.get_command_obj("build_ext")
build.inplace = True
dist.run_command("build_ext")
PY
cd "$farm"
mv pyproject.toml pytest.toml # its project table is not for this build
MICEMU_SANITIZE=$kind "$python" build.py >build.log 2>&1 || { cat build.log >&2; exit 1; }
mv pytest.toml pyproject.toml
echo "== Python tests ($kind)"
LD_PRELOAD="$(cc -print-file-name=libasan.so) $(cc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0,allow_user_segv_handler=1,handle_sigbus=0 UBSAN_OPTIONS=halt_on_error=1 \
	PYTHONPATH="$farm" PYTHONDONTWRITEBYTECODE=1 \
	"$python" -m pytest -q -p no:cacheprovider --timeout 300 -m "not system and not peer" \
	tests/hw tests/vop/test_vring*.py tests/vop/test_block*.py tests/vop/test_copy_desc.py tests/vop/test_nbd.py \
	tests/vop/test_net_wire.py tests/vop/test_net_responder.py tests/vop/test_net_pcap.py tests/vop/test_console.py
