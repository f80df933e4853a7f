#!/bin/bash
# usage: swift_up.sh FOLDER PROGRAMS PORT CERTIFICATE KEY SECRET
# A real OpenStack Swift with s3api on the loopback, with its state in FOLDER: a proxy for http at PORT, another one for
# https at the port after it, then memcached and one object, container and account server. PROGRAMS is the folder of
# Swift's commands. The access key is test:tester.
set -euo pipefail
folder=$1 programs=$2 port=$3 certificate=$4 key=$5 secret=$6
mkdir -p "$folder"/{etc,disks/d1,log}
: > "$folder/pids"
trap '"$(dirname "$0")/swift_down.sh" "$folder"' ERR
etc=$folder/etc
cat > "$etc/swift.conf" <<C
[swift-hash]
swift_hash_path_suffix = tests
swift_hash_path_prefix = tests
[storage-policy:0]
name = one
default = yes
C
# The time-outs are long: on a busy machine Swift's own (half a second to connect) would answer 503, and listings would
# wait for a daemon that is not started here.
common="[DEFAULT]
bind_ip = 127.0.0.1
swift_dir = $etc
user = $(id -un)
workers = 1
log_level = INFO
"
patience="conn_timeout = 20
node_timeout = 60
"
start() { # NAME COMMAND...: runs it in the background and remembers its id
  local name=$1; shift
  setsid "$@" < /dev/null > "$folder/log/$name.out" 2>&1 &
  echo $! >> "$folder/pids"
}
until_true() { # COMMAND...: waits a minute for it
  for _ in $(seq 200); do "$@" > /dev/null 2>&1 && return 0; sleep 0.3; done
  echo "gave up waiting for: $*" >&2
  tail -n 5 "$folder"/log/*.out >&2
  return 1
}
server() { # NAME PORT EXTRA: one of the three storage servers, and its ring of one disk
  local builder=$etc/$1.builder
  "$programs/swift-ring-builder" "$builder" create 4 1 0
  "$programs/swift-ring-builder" "$builder" add "r1z1-127.0.0.1:$2/d1" 1
  "$programs/swift-ring-builder" "$builder" rebalance
  cat > "$etc/$1.conf" <<C
${common}bind_port = $2
devices = $folder/disks
mount_check = false
[pipeline:main]
pipeline = $1-server
[app:$1-server]
use = egg:swift#$1
$3
C
  start "$1" "$programs/swift-$1-server" "$etc/$1.conf" -v
}
proxy() { # NAME PORT EXTRA: a proxy that speaks S3
  cat > "$etc/$1.conf" <<C
${common}bind_port = $2
$3
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth copy slo dlo versioned_writes symlink proxy-logging proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
recoverable_node_timeout = 60
$patience
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:$((port + 2))
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
dns_compliant_bucket_names = true
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = $secret .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
[filter:symlink]
use = egg:swift#symlink
[filter:proxy-logging]
use = egg:swift#proxy_logging
C
  start "$1" "$programs/swift-proxy-server" "$etc/$1.conf" -v
}

# The file is named so that this memcached can be told from another one when it is taken down.
start memcached memcached -u "$(id -un)" -l 127.0.0.1 -p $((port + 2)) -m 32 -P "$folder/memcached.pid"
server object $((port + 3)) "container_update_timeout = 60
$patience" > "$folder/log/rings.out"
server container $((port + 4)) "" >> "$folder/log/rings.out"
server account $((port + 5)) "" >> "$folder/log/rings.out"
proxy http "$port" ""
proxy https $((port + 1)) "cert_file = $certificate
key_file = $key"
until_true curl -sf -o /dev/null "http://127.0.0.1:$port/healthcheck"
until_true curl -skf -o /dev/null "https://127.0.0.1:$((port + 1))/healthcheck"
