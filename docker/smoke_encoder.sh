#!/usr/bin/env bash
# Smoke test of the encoder image: a pixel and byte encoder is served and answers a health check.
# In the image: docker run --rm IMAGE dsr-smoke. Takes a GPU if there is one.
set -euo pipefail
configs=${DSR_CONFIGS:-/opt/dsr-scale/configs}
work=$(mktemp -d)
server=
# shellcheck disable=SC2317  # called by the trap
cleanup() {
    [[ -z $server ]] || kill "$server" 2> /dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

dsr-scale --version
dsr-scale serve "$configs/quickstart.yaml" "directory=$work/run" 'encoders.text={kind: bytes}' \
    encoder.server.listen=127.0.0.1:0 > "$work/out" &
server=$!
for _ in {1..600}; do
    grep -q '^serving ' "$work/out" && break
    kill -0 "$server" 2> /dev/null || { echo "smoke: the server ended before it served" >&2; exit 1; }
    sleep 0.2
done
cat "$work/out"
address=$(sed -n 's/^serving \([^ ]*\) .*/\1/p' "$work/out" | head -n 1)
[[ -n $address ]] || { echo "smoke: no server within two minutes" >&2; exit 1; }

python3 - "$address" << 'PYTHON'
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

with grpc.insecure_channel(sys.argv[1]) as channel:
    health = health_pb2_grpc.HealthStub(channel)
    status = health.Check(health_pb2.HealthCheckRequest(), timeout=20).status
sys.exit(0 if status == health_pb2.HealthCheckResponse.SERVING else f"smoke: health is {status}")
PYTHON

kill -TERM "$server"
wait "$server"
server=
echo "smoke test passed"
