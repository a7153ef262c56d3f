#!/bin/sh
# One day of a card by its files only: cards_day.sh SYS WATCH CRASH
#   SYS    directory of class/mic and kernel/debug (/sys, or a mount)
#   WATCH  command: WATCH FILE WORD...  waits with select or poll until FILE holds one of the words
#   CRASH  command that kills the card's OS
set -eu
sys=$1 watch=$2 crash=$3
mic=$sys/class/mic/mic0

fail() { echo "$*: $(cat $mic/state) $(cat $mic/shutdown_status)" >&2; exit 1; }
is() { [ "$(cat $mic/state) $(cat $mic/shutdown_status)" = "$1 $2" ] || fail "not $1 $2"; }
refused() { ! (echo "$1" >$mic/state) 2>/dev/null || fail "$1 was accepted"; }

is ready nop
refused reset
refused shutdown
refused Boot
echo linux >$mic/bootmode
echo mic/uos.img >$mic/firmware
echo mic/mic0.image >$mic/ramdisk
echo quiet >$mic/cmdline
[ "$(cat $mic/cmdline)" = quiet ]
echo boot >$mic/state
$watch $mic/state online
is online nop
refused boot
up() { grep -q 'card is up' $sys/kernel/debug/mic_cosm/mic0/log_buf; }
for try in 1 2 3 4 5 6 7 8 9 10; do up && break || sleep 1; done # it says so when it is online already
up
[ "$(cat $sys/kernel/debug/mic_host/mic0/post_code)" = FF ]

$crash
$watch $mic/state shutting_down
is shutting_down crashed
up
refused boot
echo reset >$mic/state
$watch $mic/state ready
is ready nop

echo boot >$mic/state
$watch $mic/state online
echo shutdown >$mic/state
$watch $mic/state ready
echo boot >$mic/state
$watch $mic/state online
is online nop
echo done
