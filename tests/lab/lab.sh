#!/bin/bash
# Throw-away hosts that run this machine's systemd and journald inside one private session: mount,
# pid, network, IPC and UTS namespaces that disappear with everything in them.
# Needs root, cgroup v2 (hybrid will do) and the Debian packages
#   systemd systemd-container dbus e2fsprogs iproute2 mount python3 util-linux
#
#   lab.sh run CMD [ARG...]       run CMD in a new session, tear it down, exit as CMD did
# and inside the session, where $LAB is this script:
#   lab.sh up NAME                boot the host NAME; create it if it does not exist
#   lab.sh sh NAME CMD [ARG...]   run CMD on the host (exit status and standard streams are CMD's)
#   lab.sh ip NAME                print its IPv4 address, 10.99.0.N; its IPv6 address is fd99::N
#   lab.sh root NAME              print the path of its root in the session, valid until it reboots
#   lab.sh journal NAME [ARG...]  run journalctl on its journal (also while it is down)
#   lab.sh down NAME              orderly shutdown
#   lab.sh reboot NAME            orderly reboot; keeps files except /run and /tmp
#   lab.sh block NAME SIZE        add a block device of SIZE bytes and print its path on the host
#   lab.sh cut NAME               power cut: processes die at once, the link goes down without a
#                                 FIN or RST, and unsynced data at /srv is lost
#
# A host has a copy-on-write view of this machine's /usr and package database, so that packages can
# be installed and upgraded in it. Everything else is an empty tmpfs, except /srv: an ext4 file system
# of LAB_DISK bytes (512M) on a loop device. Only /srv loses unsynced data in a power cut; the tmpfs
# keeps all writes. LAB_DISK=none leaves /srv on the tmpfs.
# LAB_ROOTFS=DIR boots the tree of another distribution instead, e.g. one made by debootstrap.
set -euo pipefail
cd "$(pwd 2>/dev/null)" 2>/dev/null || cd /
self=$(readlink -f "$0")
die() { echo "lab: $*" >&2; exit 1; }
need() { command -v "$1" >/dev/null || die "needs $1 (apt-get install -y --no-install-recommends $2)"; }

# ---- The session --------------------------------------------------------------------------------

cmd_run() {
    [ "$(id -u)" = 0 ] || die "needs root"
    need systemd-nspawn systemd-container; need unshare util-linux; need setpriv util-linux
    need ip iproute2; need mkfs.ext4 e2fsprogs; need python3 python3; need dbus-daemon dbus-daemon
    local top dir=/tmp/flexnbd-lab.$$ status=0 old
    top=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/self/mounts)
    [ -n "$top" ] || die "no cgroup2 file system is mounted"
    # Remove the leftovers of killed sessions: two directories, no mounts, no processes.
    for old in /tmp/flexnbd-lab.*[0-9]; do
        if [ -d "$old" ] && [ ! -d "/proc/${old##*.}" ]; then clean "$top" "$old"; fi
    done
    mkdir -m 700 "$dir"; mkdir "$top/${dir##*/}"
    LAB_DIR=$dir LAB_CGROUP=${dir##*/} LAB_TOP=$top setpriv --pdeathsig KILL \
        unshare --mount --pid --net --ipc --uts --fork --kill-child --mount-proc \
        --propagation private "$self" _inner "$@" <&0 &
    local child=$!
    trap 'kill -KILL $child 2>/dev/null || :' INT TERM HUP   # the kernel then kills its pid namespace
    wait "$child" || status=$?
    clean "$top" "$dir"
    return $status
}

clean() { # $1: the cgroup2 mount, $2: the session's directory
    local group=$1/${2##*/} i
    if [ -e "$group/cgroup.kill" ]; then echo 1 >"$group/cgroup.kill" 2>/dev/null || :; fi
    for i in $(seq 100); do
        [ -d "$group" ] || break
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || :
        sleep .02
    done
    losetup --noheadings --output NAME,BACK-FILE | awk -v dir="$2/" 'index($2, dir) == 1 { print $1 }' |
        xargs --no-run-if-empty losetup --detach
    rm -rf --one-file-system "$2"
}

cmd__inner() { # pid 1 of the session's pid namespace
    mkdir "$LAB_TOP/$LAB_CGROUP/session"
    echo 0 >"$LAB_TOP/$LAB_CGROUP/session/cgroup.procs"
    # Only cgroup v2, also on a hybrid machine; /run of this machine stays unchanged.
    [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup
    mkdir -p /run/systemd/nspawn
    mount -t tmpfs tmpfs /run/systemd
    mkdir "$LAB_DIR/hosts"
    mount -t tmpfs -o mode=0755 tmpfs "$LAB_DIR/hosts"
    ip link set lo up
    ip link add br0 type bridge
    ip addr add 10.99.0.1/24 dev br0
    ip -6 addr add fd99::1/64 dev br0 nodad
    ip link set br0 up
    export LAB=$self
    set +e
    "$@"
    exit $?
}

# ---- A host: $host is its directory, with root/, idx, leader, supervisor and netns ----------------

choose() { name=$1; host=$LAB_DIR/hosts/$1; [ -d "$host" ] || die "no host $1"; }
leader() { cat "$host/leader"; }   # the host's pid 1, as a pid of the session
alive() { [ -d "/proc/$1" ] && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; }

# Units that tests do not need or that cannot work in a container.
MASKED="systemd-logind.service getty.target systemd-firstboot.service systemd-hwdb-update.service
    systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-random-seed.service
    systemd-pstore.service systemd-machine-id-commit.service systemd-modules-load.service
    systemd-binfmt.service systemd-repart.service systemd-ask-password-console.path
    systemd-ask-password-wall.path systemd-initctl.socket systemd-tmpfiles-clean.timer
    dev-hugepages.mount dev-mqueue.mount sys-fs-fuse-connections.mount sys-kernel-config.mount
    sys-kernel-debug.mount sys-kernel-tracing.mount proc-sys-fs-binfmt_misc.automount
    kmod-static-nodes.service systemd-pcrphase.service systemd-pcrphase-sysinit.service
    systemd-user-sessions.service systemd-tmpfiles-setup-dev.service systemd-sysctl.service
    systemd-network-generator.service e2scrub_reap.service console-getty.service modprobe@.service
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer
    man-db.timer motd-news.timer logrotate.timer"

mount_overlay() { # $1: the lower directory, $2: the mount point of the copy-on-write view
    local own=$host/cow/${2//\//_}
    mkdir -p "$own/up" "$own/scratch" "$2"
    mount -t overlay overlay -o "lowerdir=$1,upperdir=$own/up,workdir=$own/scratch" "$2"
}

make_root() {
    local root=$host/root link unit
    if [ -n "${LAB_ROOTFS:-}" ]; then
        mount_overlay "$LAB_ROOTFS" "$root"
        rm -rf "$root"/etc/systemd/system/*.wants
        mkdir -p "$root"/{var/log/journal,etc/systemd/system,srv}
    else
        mkdir -p "$root"/{etc/systemd/system,var/{lib,log,cache,tmp,spool},tmp,root,proc,sys,dev,run,mnt,srv,opt,home}
        chmod 1777 "$root/tmp" "$root/var/tmp"
        ln -s /run "$root/var/run"; ln -s /run/lock "$root/var/lock"
        for link in bin sbin lib lib32 lib64 libx32; do
            if [ -L "/$link" ]; then cp -P "/$link" "$root/$link"; fi
        done
        mount_overlay /usr "$root/usr"
        cp /etc/{passwd,group,shadow,ld.so.cache,debian_version} "$root/etc/"
        cp -a /etc/alternatives "$root/etc/"
        printf 'passwd: files systemd\ngroup: files systemd\nshadow: files\nhosts: files myhostname\n' \
            >"$root/etc/nsswitch.conf"
        ln -s ../usr/lib/os-release "$root/etc/os-release"
        rm -f "$root/usr/sbin/policy-rc.d"   # a container image uses it to forbid starting services
        # The package database, without the trigger that rebuilds the man-db index, which takes seconds.
        mount_overlay /var/lib/dpkg "$root/var/lib/dpkg"
        rm -f "$root"/var/lib/dpkg/lock*
        if [ -e "$root/var/lib/dpkg/triggers/File" ]; then
            sed -i '/man-db/d' "$root/var/lib/dpkg/triggers/File"
        fi
        mkdir -p "$root/var/log/apt" "$root/var/cache/apt"
    fi
    echo "$name" >"$root/etc/hostname"
    printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
    echo "$name" | md5sum | cut -c1-32 >"$root/etc/machine-id"
    : >"$root/etc/fstab"
    for unit in $MASKED; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
    mkdir -p "$root/etc/systemd/journald.conf.d" "$root/etc/systemd/system.conf.d"
    printf '[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\nForwardToConsole=no\nSyncIntervalSec=1s\n' \
        >"$root/etc/systemd/journald.conf.d/lab.conf"
    printf '[Manager]\nDefaultTimeoutStopSec=10s\nShowStatus=no\nStatusUnitFormat=name\n' \
        >"$root/etc/systemd/system.conf.d/lab.conf"
    if [ "${LAB_DISK:-512M}" != none ]; then
        truncate -s "${LAB_DISK:-512M}" "$LAB_DIR/$name.disk"
        mkfs.ext4 -q -F -E lazy_itable_init=1,nodiscard "$LAB_DIR/$name.disk"
        attach_disk
    fi
}

attach_disk() { mount -o loop,noatime "$LAB_DIR/$name.disk" "$host/root/srv"; }

wait_until_detached() {
    local i
    for i in $(seq 1000); do
        [ -n "$(losetup -j "$LAB_DIR/$name.disk")" ] || return 0
        sleep .01
    done
    die "something keeps the disk of $name"
}

# Creates the host's network namespace and its addresses before the host boots.
make_network() {
    local number holder; number=$(cat "$host/idx")
    unshare --net sleep infinity </dev/null >/dev/null 2>&1 &   # without the caller's pipes
    holder=$!
    echo "$holder" >"$host/netns"
    while [ "$(readlink "/proc/$holder/ns/net")" = "$(readlink /proc/self/ns/net)" ]; do
        sleep .005
    done
    # The hardware address survives a power cut, as that of a real machine does.
    ip link add "v$name" type veth peer name host0 address "02:00:00:00:00:$number" netns "$holder"
    ip link set "v$name" master br0 up
    nsenter -t "$holder" -n bash -c "ip link set lo up
        ip addr add 10.99.0.$number/24 dev host0
        ip -6 addr add fd99::$number/64 dev host0 nodad
        ip link set host0 up"
}

boot() { # becomes the host's supervisor, whose mount namespace has no other host's disk, so that
         # it never keeps that disk busy
    local group=/sys/fs/cgroup/$LAB_CGROUP/$name
    mkdir -p "$group"
    echo "$BASHPID" >"$group/cgroup.procs"
    LAB_HOST=$name exec unshare --mount --propagation slave "$self" _supervise >>"$LAB_DIR/$name.log" 2>&1
}

cmd__supervise() {
    local other
    choose "$LAB_HOST"
    for other in "$LAB_DIR"/hosts/*; do
        if [ "$other" != "$host" ] && mountpoint -q "$other/root/srv"; then
            umount "$other/root/srv"
        fi
    done
    exec systemd-nspawn -q -D "$host/root" --boot -M "$name" --register=no --keep-unit --settings=no \
        --network-namespace-path="/proc/$(cat "$host/netns")/ns/net" --console=pipe \
        --resolv-conf=off --timezone=off --link-journal=no \
        --bind="$LAB_DIR/$name.journal:/var/log/journal" \
        --capability=all --system-call-filter=@known --kill-signal=SIGRTMIN+3 \
        -- --unit=multi-user.target --log-target=journal </dev/null
}

wait_until_up() {
    local supervisor found='' child i state
    supervisor=$(cat "$host/supervisor")
    for i in $(seq 1000); do
        alive "$supervisor" || { cat "$LAB_DIR/$name.log" >&2; die "$name did not boot"; }
        # The supervisor's child that is pid 1 of its own namespace.
        for child in $(cat "/proc/$supervisor/task/$supervisor/children" 2>/dev/null); do
            if [ "$(awk '/^NSpid/ { print $NF }' "/proc/$child/status" 2>/dev/null)" = 1 ]; then
                found=$child
            fi
        done
        [ -n "$found" ] && [ -S "/proc/$found/root/run/systemd/private" ] && break
        sleep .01
    done
    [ -n "$found" ] || die "$name has no pid 1"
    echo "$found" >"$host/leader"
    state=$(inside timeout 60 systemctl is-system-running --wait) || :
    [ "$state" = running ] || {
        echo "lab: $name is $state" >&2
        inside systemctl --failed --no-legend >&2 || :
    }
}

inside() { nsenter -t "$(leader)" -m -u -i -n -p -- "$@"; }

cmd_up() {
    name=$1; host=$LAB_DIR/hosts/$1
    if [ ! -d "$host" ]; then
        mkdir -p "$host/root" "$LAB_DIR/$name.journal"
        # The next free address, under a lock because hosts boot in parallel.
        (
            flock 9
            number=$(cat "$LAB_DIR/next" 2>/dev/null || echo 11)
            echo "$number" >"$host/idx"
            echo $((number + 1)) >"$LAB_DIR/next"
        ) 9>"$LAB_DIR/lock"
        make_root
    fi
    if [ ! -s "$host/netns" ] || ! alive "$(cat "$host/netns")"; then make_network; fi
    boot </dev/null &
    echo $! >"$host/supervisor"
    wait_until_up
}

cmd_sh() {
    choose "$1"; shift
    exec nsenter -t "$(leader)" -m -u -i -n -p -C --wd=/ -- /usr/bin/env -C / -i \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb LANG=C.UTF-8 \
        HOME=/root SYSTEMD_PAGER= SYSTEMD_COLORS=0 DEBIAN_FRONTEND=noninteractive "$@"
}

cmd_ip() { choose "$1"; echo "10.99.0.$(cat "$host/idx")"; }

cmd_root() {
    choose "$1"
    # The root of a running host includes its /run.
    if alive "$(leader)"; then echo "/proc/$(leader)/root"; else echo "$host/root"; fi
}

cmd_journal() {
    choose "$1"; shift
    inside journalctl --sync 2>/dev/null || :
    journalctl -D "$LAB_DIR/$name.journal" --no-pager "$@"
}

cmd_block() {
    choose "$1"
    local file device; file=$LAB_DIR/$name.block.$(find "$LAB_DIR" -name "$name.block.*" | wc -l)
    truncate -s "$2" "$file"
    device=$(losetup --show --find "$file")
    # The host has its own /dev without udev, so the device node is created here.
    inside mknod -m 660 "$device" b "$((0x$(stat -c %t "$device")))" "$((0x$(stat -c %T "$device")))"
    inside chgrp disk "$device"
    echo "$device"
}

wait_until_gone() { # $1: pid, $2: hundredths of a second
    local i
    for i in $(seq "$2"); do alive "$1" || return 0; sleep .01; done
    return 1
}

cmd_down() {
    choose "$1"
    local supervisor; supervisor=$(cat "$host/supervisor")
    kill -TERM "$supervisor" 2>/dev/null || :   # nspawn asks the host's pid 1 to power off
    wait_until_gone "$supervisor" 6000 || die "$name does not shut down"
}

cmd_reboot() { cmd_down "$1"; cmd_up "$1"; }

cmd_cut() {
    choose "$1"
    local supervisor; supervisor=$(cat "$host/supervisor")
    ip link del "v$name"                       # first, so that no closing socket sends FIN or RST
    kill -KILL "$(leader)"
    wait_until_gone "$supervisor" 1000 || kill -KILL "$supervisor"
    kill -KILL "$(cat "$host/netns")"          # this destroys the sockets that would retransmit
    wait_until_gone "$(cat "$host/netns")" 1000
    if mountpoint -q "$host/root/srv"; then
        # EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH: from now on nothing reaches the disk,
        # not even the journal.
        python3 -c 'import fcntl, os, struct, sys
fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587D, struct.pack("I", 2))' "$host/root/srv"
        umount "$host/root/srv"
        # The host's mount of it disappears a moment later; mounting earlier would return the shut
        # down file system.
        wait_until_detached
        attach_disk                            # replays the file system's journal
    fi
}

command=${1:-}
[ -n "$command" ] || { sed -n '2,/^set -e/p' "$self" | sed '$d; s/^# \{0,1\}//'; exit 2; }
shift
declare -F "cmd_$command" >/dev/null || die "unknown command $command"
"cmd_$command" "$@"
