#!/bin/bash
# Throw-away virtual machines with Debian's own kernel, for tests of the kernel's NBD client and of
# block devices, which need modules that the kernel of this machine may not have.
# Emulates the processor, 10 to 20 times slower than this machine: shows behaviour, never speed.
# VM_ACCEL=kvm uses KVM instead, which does not work in every virtual machine that offers it.
# Needs root on amd64 and the Debian packages
#   busybox-static cpio e2fsprogs iproute2 kmod mmdebstrap mount qemu-system-x86 zstd
#
#   vm.sh prepare                 make what the other commands boot, in VM_DIR, unless it exists
#   vm.sh run [OPTION...] SCRIPT [FILE...]
#                                 boot the kernel with a file system in memory, run SCRIPT with bash
#                                 in /tmp, print its output, exit as it did; 124 after the time limit
#       -p "PROGRAM..."           programs of this machine to have there, besides bash, busybox's
#                                 applets, ip, tc, mount and modprobe
#       -k "MODULE..."            kernel modules to load
#   vm.sh host [OPTION...] SCRIPT [FILE...]
#                                 the same on a Debian with systemd and udev. Changes to its disk last
#                                 until the machine ends; after a reboot SCRIPT runs again
#
# Both options -m MIB (memory) and -s SECONDS (time limit, 300) belong to `run` and `host`. FILEs are
# in /job. There is no network but the loopback interface.
# VM_DIR is target/vm of the project; it holds the kernel and the disk of `host`.
set -euo pipefail
self=$(readlink -f "$0")
VM_DIR=${VM_DIR:-$(dirname "$self")/../../target/vm}
HOST_PACKAGES="btrfs-progs dbus e2fsprogs fdisk fio iproute2 kmod nbd-client procps strace systemd-sysv udev xfsprogs"
# Units that tests do not need, and that take a third of the boot.
MASKED="dev-hugepages.mount dev-mqueue.mount dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service
    fstrim.timer getty@tty1.service modprobe@.service proc-sys-fs-binfmt_misc.automount
    serial-getty@ttyS0.service sys-fs-fuse-connections.mount sys-kernel-config.mount
    sys-kernel-debug.mount sys-kernel-tracing.mount systemd-binfmt.service systemd-logind.service
    systemd-pcrphase-sysinit.service systemd-pcrphase.service systemd-pstore.service
    systemd-random-seed.service systemd-tmpfiles-clean.timer systemd-update-utmp-runlevel.service
    systemd-update-utmp.service systemd-user-sessions.service"
die() { echo "vm: $*" >&2; exit 1; }
need() { command -v "$1" >/dev/null || die "needs $1 (apt-get install -y --no-install-recommends $2)"; }

# ---- Kernel and disk, made once -----------------------------------------------------------------

cmd_prepare() {
    [ "$(id -u)" = 0 ] || die "needs root"
    [ "$(dpkg --print-architecture)" = amd64 ] || die "needs amd64"
    need qemu-system-x86_64 qemu-system-x86; need busybox busybox-static; need cpio cpio
    need zstd zstd; need depmod kmod; need mke2fs e2fsprogs
    need mmdebstrap mmdebstrap; need ip iproute2; need tc iproute2
    mkdir -p "$VM_DIR"
    # shellcheck source=/dev/null
    release=$(. /etc/os-release; echo "$VERSION_CODENAME")
    (
        flock 9
        make_kernel
        make_disk
    ) 9>"$VM_DIR/lock"
}

# Fetches the release's kernel for virtual machines; does not install it on this machine.
make_kernel() {
    local new=$VM_DIR/kernel.new package
    [ ! -s "$VM_DIR/kernel" ] || return 0
    rm -rf "$new" "$VM_DIR/modules"; mkdir -p "$new"
    cd "$new"
    # Fails if the package lists are older than the newest kernel.
    fetch_kernel || { apt-get -qq update; fetch_kernel; } || die "apt has no kernel for virtual machines"
    dpkg -x ./*.deb root
    [ -d root/lib ] || ln -s usr/lib root/lib   # since Debian 13
    depmod -b "$new/root" "$(ls root/lib/modules)"
    mv root/lib/modules ../modules
    mv root/boot/vmlinuz-* ../kernel
    cd "$VM_DIR"
    rm -rf "$new"
}

fetch_kernel() {
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: //p' | head -1)
    [ -n "$package" ] && apt-get -qq -o APT::Sandbox::User=root download "$package"
}

# The packages of the disk come from where apt on this machine takes those of Debian.
make_disk() {
    local root=$VM_DIR/disk.new made unit mirror
    made="$release $(ls "$VM_DIR/modules") $(sha256sum <"$self")"
    [ ! -s "$VM_DIR/disk" ] || [ "$(cat "$VM_DIR/disk.made")" != "$made" ] || return 0
    # shellcheck disable=SC2016 # names of apt's fields
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' \
        "Codename: $release" 'Component: main' | head -1)
    [ -n "$mirror" ] || die "apt has no source for $release"
    rm -rf "$root" "$VM_DIR/disk"
    mmdebstrap --quiet --variant=essential --include="${HOST_PACKAGES// /,}" \
        --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/locale/*' \
        "$release" "$root" "deb $mirror $release main" >&2
    cp -r "$VM_DIR/modules" "$root/usr/lib/"
    echo host >"$root/etc/hostname"
    printf '127.0.0.1 localhost host\n::1 localhost\n' >"$root/etc/hosts"
    : >"$root/etc/fstab"
    mkdir -p "$root/var/log/journal" "$root/job"
    for unit in $MASKED; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
    # Drivers that udev would load for the emulated processor and devices.
    printf 'blacklist %s\n' aesni_intel crc32_pclmul crct10dif_pclmul ghash_clmulni_intel sha512_ssse3 \
        sha256_ssse3 sha1_ssse3 kvm evdev button serio_raw >"$root/etc/modprobe.d/drivers.conf"
    cat >"$root/etc/systemd/system/job.service" <<'X'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
WorkingDirectory=/tmp
Environment=HOME=/root LANG=C.UTF-8
ExecStart=/bin/bash -c 'mount -o ro /dev/vdb /job; exec >/dev/ttyS1 2>&1; echo vm-begins; \
    bash /job/script </dev/null; status=$$?; \
    if systemctl is-system-running | grep -qx stopping; then exit; fi; \
    echo; echo "vm-ends $$status"; systemctl poweroff --force --force'
X
    mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
    ln -s ../job.service "$root/etc/systemd/system/multi-user.target.wants/job.service"
    mke2fs -q -F -t ext4 -d "$root" "$VM_DIR/disk.img" 4G >/dev/null
    rm -rf "$root"
    mv "$VM_DIR/disk.img" "$VM_DIR/disk"
    echo "$made" >"$VM_DIR/disk.made"
}

# ---- Pieces of a machine: $T is its directory, $R the root of its initial file system -----------

begin() { # sets $T, $R and $kernel
    cmd_prepare
    T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
    R=$T/root; kernel=$(ls "$VM_DIR/modules")
    mkdir -p "$R"/{bin,dev,proc,sys,tmp,run,mnt,job,root,etc,var/tmp,var/lib,new}
    program busybox
}

# Adds a program of this machine, with the libraries that it needs.
program() {
    local path
    path=$(command -v "$1") || die "there is no program $1"
    path=$(readlink -f "$path")
    mkdir -p "$R$(dirname "$path")"
    [ -e "$R$path" ] || cp "$path" "$R$path"
    libraries "$path"
    rm -f "$R/bin/${1##*/}"
    [ "$path" = "/bin/${1##*/}" ] || ln -s "$path" "$R/bin/${1##*/}"
}

libraries() {
    local file
    for file in $(ldd "$1" 2>/dev/null | grep -o '/[^ ]*'); do
        [ -e "$R$file" ] || { mkdir -p "$R$(dirname "$file")"; cp -L "$file" "$R$file"; }
    done
}

# Adds modprobe, these kernel modules and those that they need.
modules() {
    local tree=lib/modules/$kernel module file
    program modprobe
    mkdir -p "$R/$tree"; cp "$VM_DIR/modules/$kernel"/modules.* "$R/$tree/"
    for module; do
        for file in $(awk -v module="$module" '{
            file = name = $1; sub(/:$/, "", file); gsub(/.*\/|\.ko.*/, "", name); gsub(/-/, "_", name)
            if (name == module) { print file; for (i = 2; i <= NF; i++) print $i }
        }' "$R/$tree/modules.dep"); do
            mkdir -p "$R/$tree/$(dirname "$file")"; cp "$VM_DIR/modules/$kernel/$file" "$R/$tree/$file"
        done
    done
}

pack() { (cd "$R" && find . | cpio -o -H newc --quiet | zstd -1 -q >"$T/initrd"); }

# Boots; copies the script's output, which it writes to the second serial port. The kernel's messages
# go to the first one, so that they do not interrupt it. $1: memory, $2: time limit, $3: words for the
# kernel, others: options of QEMU.
boot() {
    local memory=$1 seconds=$2 words=$3 status; shift 3
    (timeout "$seconds" qemu-system-x86_64 -M q35 -accel "${VM_ACCEL:-tcg,thread=multi}" -cpu max \
        -smp 2 -m "$memory" -nodefaults -display none -serial "file:$T/console" -serial stdio \
        -kernel "$VM_DIR/kernel" -initrd "$T/initrd" "$@" \
        -append "console=ttyS0 quiet loglevel=3 mitigations=off $words" </dev/null 2>&1 || :) |
        tr -d '\r' | awk -v status="$T/status" \
        '/^vm-begins$/ { on = 1; next } /^vm-ends / { print $2 >status; exit } on { print; fflush() }' || :
    status=$(cat "$T/status" 2>/dev/null || echo 124)
    [ "$status" != 124 ] || { echo "vm: no result after $seconds s; the console:"; tail -c 4000 "$T/console"; } >&2
    return "$status"
}

# ---- Commands -----------------------------------------------------------------------------------

cmd_run() {
    local memory=1024 seconds=300 programs='' modules='' option name file
    while getopts m:s:p:k: option; do
        case $option in
        m) memory=$OPTARG ;; s) seconds=$OPTARG ;; p) programs=$OPTARG ;; k) modules=$OPTARG ;; *) exit 2 ;;
        esac
    done
    shift $((OPTIND - 1)); [ $# -ge 1 ] || die "run what?"
    begin
    for name in $(busybox --list); do [ "$name" = busybox ] || ln -s busybox "$R/bin/$name"; done
    for name in bash ip tc mount umount $programs; do program "$name"; done
    cp -r --parents /usr/lib/locale/C.utf8 "$R" 2>/dev/null || :
    # shellcheck disable=SC2086 # one word for each module
    modules $modules
    cp "$1" "$R/job/script"; shift
    for file; do
        cp -r "$file" "$R/job/"
        if [ -f "$file" ] && [ -x "$file" ]; then libraries "$file"; fi
    done
    echo 'root:x:0:0:root:/root:/bin/bash' >"$R/etc/passwd"; echo 'root:x:0:' >"$R/etc/group"
    cat >"$R/init" <<X
#!/bin/bash
export PATH=/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for place in /tmp /run /mnt /dev/shm /var/tmp; do mkdir -p \$place; mount -t tmpfs none \$place; done
ip link set lo up
for module in $modules; do modprobe \$module || echo "vm: no module \$module"; done
cd /tmp; exec >/dev/ttyS1 2>&1
echo vm-begins; bash /job/script </dev/null; status=\$?; echo; echo "vm-ends \$status"
echo o >/proc/sysrq-trigger; sleep 60
X
    chmod +x "$R/init"; pack
    boot "$memory" "$seconds" panic=1 -no-reboot
}

cmd_host() {
    local memory=1536 seconds=300 option file
    while getopts m:s: option; do case $option in m) memory=$OPTARG ;; s) seconds=$OPTARG ;; *) exit 2 ;; esac; done
    shift $((OPTIND - 1)); [ $# -ge 1 ] || die "run what?"
    begin
    mkdir -p "$T/job"
    modules virtio_blk virtio_pci ext4
    cp "$1" "$T/job/script"; shift
    for file; do cp -r "$file" "$T/job/"; done
    mke2fs -q -F -t ext4 -d "$T/job" "$T/job.img" $(($(du -sm "$T/job" | cut -f1) + 32))M >/dev/null
    cat >"$R/init" <<'X'
#!/bin/busybox sh
busybox=/bin/busybox
$busybox mount -t devtmpfs dev /dev
$busybox mount -t sysfs sys /sys   # tells modprobe that the kernel decompresses modules
for module in virtio_pci virtio_blk ext4; do /bin/modprobe $module; done
$busybox umount /sys
$busybox mount -t ext4 /dev/vda /new && exec $busybox switch_root /new /sbin/init
$busybox poweroff -f
X
    chmod +x "$R/init"; pack
    boot "$memory" "$seconds" systemd.show_status=0 \
        -drive "file=$VM_DIR/disk,if=virtio,format=raw,snapshot=on" \
        -drive "file=$T/job.img,if=virtio,format=raw,readonly=on"
}

command=${1:-}
[ -n "$command" ] || { sed -n '2,/^set -e/p' "$self" | sed '$d; s/^# \{0,1\}//'; exit 2; }
shift
declare -F "cmd_$command" >/dev/null || die "unknown command $command"
"cmd_$command" "$@"
