#!/bin/bash
# usage: ceph_up.sh FOLDER HTTP_PORT HTTPS_PORT MONITOR_PORT CERTIFICATE KEY ACCESS SECRET
# A real Ceph object store on the loopback, in memory, with its state in FOLDER: one monitor, one disk, one gateway.
set -euo pipefail
folder=$1 http=$2 https=$3 monitor=$4 certificate=$5 key=$6 access=$7 secret=$8
mkdir -p "$folder"/{mon,osd,rgw,log,run}
: > "$folder/pids"
trap '"$(dirname "$0")/ceph_down.sh" "$folder"' ERR
fsid=$(cat /proc/sys/kernel/random/uuid)
conf=$folder/ceph.conf keyring=$folder/keyring
cat > "$conf" <<C
[global]
fsid = $fsid
mon host = v2:127.0.0.1:$monitor
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
ms bind msgr1 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
run dir = $folder/run
admin socket = $folder/run/\$name.\$pid.asok
log file = $folder/log/\$name.log
keyring = $keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail warn = 1
auth allow insecure global id reclaim = false
mon max pg per osd = 1000
osd objectstore = memstore
memstore device bytes = 4294967296
osd data = $folder/osd
mon data = $folder/mon
[client.rgw.test]
rgw frontends = beast endpoint=127.0.0.1:$http ssl_endpoint=127.0.0.1:$https ssl_certificate=$certificate ssl_private_key=$key
keyring = $keyring
rgw data = $folder/rgw
C
export CEPH_CONF=$conf
start() { # NAME COMMAND...: runs it in the background and remembers its id
  local name=$1; shift
  setsid "$@" < /dev/null > "$folder/log/$name.out" 2>&1 &
  echo $! >> "$folder/pids"
}
until_true() { # COMMAND...: waits a minute for it
  for _ in $(seq 200); do "$@" > /dev/null 2>&1 && return 0; sleep 0.3; done
  echo "gave up waiting for: $*" >&2
  return 1
}
ceph_cli() { timeout 60 ceph -c "$conf" "$@"; }
osd_is_up() { ceph_cli osd stat | grep -q '1 up'; }

ceph-authtool -C "$keyring" --gen-key -n mon. --cap mon 'allow *' > /dev/null
ceph-authtool "$keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mds 'allow *' --cap mgr 'allow *' > /dev/null
ceph-authtool "$keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' --cap mgr 'allow profile osd' > /dev/null
ceph-authtool "$keyring" --gen-key -n client.rgw.test --cap mon 'allow rw' --cap osd 'allow rwx' > /dev/null
monmaptool --create --addv a "[v2:127.0.0.1:$monitor]" --fsid "$fsid" "$folder/monmap" > /dev/null
ceph-mon -c "$conf" --mkfs -i a --monmap "$folder/monmap" --keyring "$keyring"
start mon ceph-mon -c "$conf" -i a -f
ceph_cli -s > /dev/null
disk=$(cat /proc/sys/kernel/random/uuid)
ceph_cli osd new "$disk" > /dev/null
ceph-osd -c "$conf" -i 0 --mkfs --osd-uuid "$disk" > "$folder/log/mkfs.out" 2>&1
start osd ceph-osd -c "$conf" -i 0 -f
until_true osd_is_up
start rgw radosgw -c "$conf" -n client.rgw.test -f
until_true curl -s -o /dev/null "http://127.0.0.1:$http"
timeout 120 radosgw-admin -c "$conf" user create --uid=test --display-name=test --access-key="$access" --secret-key="$secret" > /dev/null
