#!/usr/bin/env bash
# Build the image and run it for real: it trains, `stop` ends it with a checkpoint in time, the same command goes on, as root and
# as a user that has no name. Docker where there is one; else buildah, podman and runc (Debian packages), as root.
#
#   scripts/test_image.sh                              # on a base made here: debootstrap and torch's CPU build, 15 minutes
#   BASE_IMAGE=pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime GPUS=all scripts/test_image.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install requirements-prep.txt
WORK="${WORK:-$(mktemp -d)}" # a base that was made there once is used again
IMAGE=perennial-test
mkdir -p "$WORK"
LIMITS=(--ulimit nofile=1024:1024 --ulimit nproc=4096:4096)

say() { printf '%-10s %s\n' "$1" "$2"; }
fail() {
  say failed "$1" >&2
  exit 1
}

if docker info >/dev/null 2>&1; then
  engine() { docker "$@"; }
  build() { docker build --quiet --build-arg BASE_IMAGE="$1" --tag "$IMAGE" .; }
else
  for program in buildah podman runc; do
    command -v $program >/dev/null || fail "neither Docker nor $program is here: apt-get install buildah podman runc"
  done
  [ "$(id -u)" = 0 ] || fail "without Docker this needs to be root"
  # a driver that needs no kernel support, and its own place: nothing of the user's images is touched
  STORE=(--root "$WORK/store" --runroot "$WORK/runroot" --storage-driver "${STORAGE_DRIVER:-vfs}")
  engine() { podman "${STORE[@]}" --runtime "$(command -v runc)" --cgroup-manager cgroupfs "$@"; }
  # one layer, as vfs copies the whole image for each; an isolation that needs no rights beyond a chroot
  # podman has systemd run health checks, and there may be none
  LIMITS+=(--no-healthcheck)
  build() { buildah "${STORE[@]}" bud --quiet --isolation chroot --layers=false --format docker --build-arg BASE_IMAGE="$1" --tag "$IMAGE" .; }
fi

make_base() { # a Debian with Python and torch's CPU build, of packages that this machine's pip fetches
  local root="$WORK/base"
  command -v debootstrap >/dev/null || fail "no BASE_IMAGE is given and debootstrap is not here: apt-get install debootstrap"
  if [ ! -e "$root/done" ]; then
    rm -rf "$root"
    debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates bookworm "$root" >"$WORK/debootstrap.log"
    "$PYTHON" -m pip download -qq --only-binary :all: --python-version 3.11 --implementation cp \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform linux_x86_64 \
      -d "$root/wheels" -r requirements.txt s3fs -c constraints.txt
    cp requirements.txt "$root/wheels"
    chroot "$root" env -i PATH=/usr/bin:/bin python3 -m pip install -q --break-system-packages --root-user-action ignore --no-index --find-links /wheels \
      -r /wheels/requirements.txt s3fs
    rm -rf "$root/wheels" "$root/var/cache/apt/archives"/*.deb
    touch "$root/done"
  fi
  say base "$(du -sh "$root" | cut -f1) of Debian, Python and torch"
  tar -C "$root" -c . | engine import - localhost/perennial-base >/dev/null
  BASE_IMAGE=localhost/perennial-base
}

[ -n "${BASE_IMAGE:-}" ] || make_base
build "$BASE_IMAGE" >"$WORK/build.log" 2>&1 || { tail -20 "$WORK/build.log"; fail "the image cannot be built"; }
say built "$IMAGE on $BASE_IMAGE"

volume="$WORK/volume"
rm -rf "$volume"
mkdir -p "$volume"
"$PYTHON" scripts/demo_corpus.py --force --output "$WORK/demo.txt" --megabytes 0.6 >/dev/null
"$PYTHON" prep/tokenize_bpe.py --input "$WORK/demo.txt" --output "$volume/data" --vocab-size 512 --compress >/dev/null
chmod -R a+rwX "$volume"

[ -z "${GPUS:-}" ] || LIMITS+=(--gpus "$GPUS")
TRAIN=(--model tiny --block-size 64 --batch 8 --steps "${STEPS:-600}" --save-every-minutes 60 --sample-every 0 --grace-seconds 8 --resume)

start() { # start NAME [OPTIONS]: the same command every time, in the background
  local name="$1"
  shift
  engine run --detach --name "$name" "${LIMITS[@]}" --volume "$volume:/workspace" --stop-timeout 10 "$@" "$IMAGE" "${TRAIN[@]}" >/dev/null
}

said() { # said NAME WORDS; not in a pipe, which grep would close before all is written
  [[ "$(engine logs "$1" 2>&1)" == *"$2"* ]]
}

wait_for() { # wait_for NAME WORDS: in the container's log, for a minute
  local i
  for i in $(seq 240); do
    if said "$1" "$2"; then return; fi
    [ "$(engine inspect --format '{{.State.Running}}' "$1")" = true ] || break
    sleep 0.25
  done
  engine logs "$1" 2>&1 | tail -20
  fail "container $1 never said: $2"
}

for user in 0:0 12345:12345; do
  rm -rf "$volume/out" "$volume/.cache"
  engine rm --force first second >/dev/null 2>&1 || true

  start first --user "$user"
  wait_for first "step 20/"
  engine exec first python3 /opt/perennial/train/heartbeat.py >"$WORK/health" || fail "the health check says: $(cat "$WORK/health")"
  began=$(date +%s%N)
  engine stop first >/dev/null
  took=$((($(date +%s%N) - began) / 1000000))
  code="$(engine inspect --format '{{.State.ExitCode}}' first)"
  [ "$code" = 75 ] || fail "stop ended it with exit code $code, expected 75: $(engine logs first 2>&1 | tail -3)"
  [ "$took" -lt 10000 ] || fail "stop took $took ms, expected less than 10 s"
  ls "$volume"/out/step-*/MANIFEST.json >/dev/null || fail "no checkpoint after stop"
  say "user $user" "stopped in $took ms: $(engine logs first 2>&1 | grep 'stopped by'); $(cat "$WORK/health")"

  start second --user "$user"
  [ "$(engine wait second)" = 0 ] || fail "the second run: $(engine logs second 2>&1 | tail -5)"
  said second "goes on from step" || fail "the second run began anew"
  say "user $user" "$(engine logs second 2>&1 | grep 'goes on from step'); $(engine logs second 2>&1 | tail -1)"
done
[[ "$(engine run --rm "${LIMITS[@]}" "$IMAGE" --help)" == *--resume* ]] || fail "--help"
code=0
engine run --rm "${LIMITS[@]}" "$IMAGE" --data /nowhere --resume 2>"$WORK/error" || code=$?
[ "$code" = 2 ] && [ "$(wc -l <"$WORK/error")" = 1 ] || fail "a wrong folder: exit code $code, $(cat "$WORK/error")"
engine rm --force first second >/dev/null 2>&1 || true
say done "built, trained, stopped and resumed, as root and as a user without a name"
