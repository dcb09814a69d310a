#!/usr/bin/env bash
# Serves an NVMe controller and a DSA to a Linux guest, and shows what Linux says about them.
#
#   PVFIO_RIG=DIR examples/linux_guest.sh    boots the guest that DIR/make-rig.sh built, looks around in it, and ends
#   examples/linux_guest.sh OPTION...        your own guest on your own QEMU, 10.1 or newer, until it ends; for example
#                                            -drive file=debian.qcow2,if=virtio -nographic
set -euo pipefail

# What to look at in the guest. The accelerator needs idxd, a processor with MOVDIR64B or the rig's build of the driver.
read -r -d '' look <<'END' || true
modprobe nvme
until [ -b /dev/nvme0n1 ]; do sleep 0.1; done
echo "== PCI"; lspci -nnk -s 00:10.0; lspci -nnk -s 00:11.0
echo "== the disk"; nvme list; nvme smart-log /dev/nvme0 | head -8
mkfs.ext4 -q /dev/nvme0n1 && mount /dev/nvme0n1 /mnt && cp -r /etc /mnt && df -h /mnt && umount /mnt
echo "== the accelerator"; dsa-dmatest.sh 100
echo "== the kernel's log"; dmesg | grep -E 'nvme|idxd|dmatest'
END

folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || { kill "$server"; wait "$server" || true; }; rm -rf "$folder"' EXIT

truncate -s 256M "$folder/disk.img"
${PVFIO:-pvfio} serve \
    --device "nvme,socket=$folder/nvme.sock,image=$folder/disk.img" \
    --device "dsa,socket=$folder/dsa.sock" >"$folder/serve.log" &
server=$!
until grep -qs '^pvfio: ready' "$folder/serve.log"; do
    kill -0 "$server" # has it ended?
    sleep 0.1
done

if [ $# -eq 0 ]; then
    "${PVFIO_RIG:?names the folder of run-guest.sh; or give QEMU options of your own guest}/run-guest.sh" \
        --vfio-user "$folder/nvme.sock" --vfio-user "$folder/dsa.sock" -- "$look"
else
    qemu-system-x86_64 -machine q35,accel=kvm:tcg,memory-backend=ram -cpu max -smp 2 -m 2G \
        -object memory-backend-memfd,id=ram,size=2G,share=on \
        -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"'"$folder"'/nvme.sock"}}' \
        -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"'"$folder"'/dsa.sock"}}' \
        "$@"
fi
