#!/usr/bin/env bash
# A training run on a Cloud TPU slice, or on several: created or reused, installed, run, followed, resumed.
set -euo pipefail

usage() {
  cat <<'EOF'
launch/tpu_vm.sh run --name NAME --zone ZONE --type TYPE [OPTIONS] -- COMMAND…
launch/tpu_vm.sh logs|stop|delete --name NAME --zone ZONE [OPTIONS]

run     asks for the slice as a queued resource, or reuses it; copies what is committed here and installs it on all
        workers; starts COMMAND on all of them and follows the log of the first. Goes on after a preemption: a slice that is gone
        is asked for again. Losing this terminal ends nothing: the same line follows the run again.
logs    follows the log of the first worker
stop    has the run save and end (SIGTERM)
delete  gives the slice back

  --type TYPE       accelerator, such as v5litepod-256, v5p-128 or v6e-256
  --slices N        slices of this type, joined over the data-centre network (1)
  --spot            preemptible capacity; --reserved: of a reservation
  --version V       software of the machines (by default the one for TYPE)
  --project P       Google Cloud project (by default gcloud's)
  --restarts K      start again up to K times after a failure that was no preemption (0)
  --dry-run         print every gcloud command of a run that is preempted once

Exit code: that of COMMAND on the first worker.
EOF
}

readonly EXIT_PREEMPTED=75
readonly REMOTE=svg_jax_run # folder on the workers

fail() {
  echo "error: $*" >&2
  exit 2
}

action='' name='' zone='' type='' slices=1 spot='' reserved='' version='' project='' restarts=0 dry_run=''
while (($#)); do
  case $1 in
    --help | -h) usage && exit ;;
    --dry-run | --spot | --reserved)
      option=${1#--}
      declare "${option//-/_}=1" && shift
      ;;
    --name | --zone | --type | --slices | --version | --project | --restarts)
      (($# > 1)) || fail "$1 needs a value"
      declare "${1#--}=$2" && shift 2
      ;;
    --) shift && break ;;
    -*) fail "unknown option $1: see --help" ;;
    *)
      [[ -z $action ]] || fail "'$1' comes where -- was expected: tpu_vm.sh run … -- COMMAND…"
      action=$1 && shift
      ;;
  esac
done
case $action in
  run)
    [[ -n $type ]] || fail "run needs --type, such as v5litepod-256"
    (($#)) || fail "which command? tpu_vm.sh run … -- COMMAND…"
    ;;
  logs | stop | delete) ;;
  '') fail "what to do? run, logs, stop or delete: see --help" ;;
  *) fail "unknown action '$action': run, logs, stop or delete" ;;
esac
[[ -n $name && -n $zone ]] || fail "$action needs --name and --zone"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices is '$slices': it must be a whole number from 1 on"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts is '$restarts': it must be a whole number from 0 on"
[[ -z $spot || -z $reserved ]] || fail "--spot and --reserved exclude each other"

case $type in # the software that Google names for each generation
  v5litepod-*) version=${version:-v2-alpha-tpuv5-lite} ;;
  v5p-*) version=${version:-v2-alpha-tpuv5} ;;
  v6e-*) version=${version:-v2-alpha-tpuv6e} ;;
  v4-*) version=${version:-tpu-ubuntu2204-base} ;;
  '') ;;
  *) [[ -n $version ]] || fail "--type '$type' is not known here (v4-, v5litepod-, v5p-, v6e-): name its software with --version" ;;
esac

where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

quoted() { # ARGUMENTS…: as a shell reads them
  local argument
  for argument; do
    if [[ $argument =~ ^[[:alnum:]_./:=@%+,-]+$ ]]; then printf '%s ' "$argument"; else printf '%s ' "${argument@Q}"; fi
  done
}

exec 3>&1 # what a dry run prints, inside command substitutions too
tpus() { # ARGUMENTS…
  if [[ -n $dry_run ]]; then
    echo "gcloud compute tpus $(quoted "$@" "${where[@]}")" >&3
  else
    gcloud compute tpus "$@" "${where[@]}"
  fi
}

ask() { # ANSWER-OF-A-DRY-RUN ARGUMENTS…
  local answer=$1
  shift
  if [[ -n $dry_run ]]; then
    tpus "$@"
    echo "$answer"
  else
    tpus "$@" 2>/dev/null || true
  fi
}

everywhere() { # COMMAND: on all workers of all slices
  local node
  for node in "${nodes[@]}"; do tpus tpu-vm ssh "$node" --worker=all --command="$1"; done
}

create() {
  local arguments=("--accelerator-type=$type" "--runtime-version=$version")
  if ((slices > 1)); then
    arguments+=("--node-count=$slices" "--node-prefix=$name")
  else
    arguments+=("--node-id=$name")
  fi
  [[ -z $spot ]] || arguments+=(--spot)
  [[ -z $reserved ]] || arguments+=(--reserved)
  tpus queued-resources create "$name" "${arguments[@]}"
}

delete() {
  tpus queued-resources delete "$name" --force --quiet
}

get_slice() { # STATE-OF-A-DRY-RUN: waits until it is there; sets `fresh` if it was made now
  local state pretended=$1
  fresh=''
  while true; do
    state=$(ask "$pretended" queued-resources describe "$name" '--format=value(state.state)')
    case $state in
      ACTIVE) return ;;
      '') create && fresh=1 ;;
      FAILED | SUSPENDED | SUSPENDING) # it was preempted, or never came
        delete
        create && fresh=1
        ;;
      *) echo "slice $name: $state" >&2 ;;
    esac
    pretended=ACTIVE
    [[ -n $dry_run ]] || sleep 30
  done
}

install() {
  local archive=/tmp/$REMOTE.tgz node
  [[ -n $dry_run ]] || git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --format=tgz --output="$archive" HEAD
  for node in "${nodes[@]}"; do tpus tpu-vm scp "$archive" "$node:" --worker=all; done
  # The machines come with an older Python.
  everywhere "mkdir -p $REMOTE && tar -xzf $REMOTE.tgz -C $REMOTE && curl -LsSf https://astral.sh/uv/install.sh | sh \
&& cd $REMOTE && ~/.local/bin/uv venv --clear --python 3.11 && ~/.local/bin/uv pip install -e '.[tpu]'"
}

start() { # COMMAND…: detached, so that it outlives this terminal
  local script
  script=". .venv/bin/activate; $(quoted "$@"); echo \$? >run.exit"
  everywhere "cd $REMOTE && rm -f run.exit && (setsid nohup bash -c ${script@Q} >run.log 2>&1 </dev/null &)"
}

follow() {
  tpus tpu-vm ssh "${nodes[0]}" --worker=0 \
    --command="cd $REMOTE && (tail -n 100 -F run.log & until [ -e run.exit ]; do sleep 5; done; kill \$!)" || true
}

running() {
  [[ -z $dry_run ]] && tpus tpu-vm ssh "${nodes[0]}" --worker=0 \
    --command="test ! -e $REMOTE/run.exit && pgrep -u \$USER python" >/dev/null 2>&1
}

case $action in
  logs) follow ;;
  stop) everywhere "pkill -TERM -u \$USER python" ;;
  delete) delete ;;
  run)
    get_slice ''
    running || { install && start "$@"; }
    pretended=$EXIT_PREEMPTED
    while true; do
      follow
      code=$(ask "$pretended" tpu-vm ssh "${nodes[0]}" --worker=0 --command="cat $REMOTE/run.exit")
      [[ $code != 0 ]] || exit 0
      if [[ -n $code && $code != "$EXIT_PREEMPTED" ]] && ((restarts-- <= 0)); then
        exit "$code"
      fi
      # No code: the machine is gone, or only the connection to it.
      echo "the run ended (${code:-the first worker does not answer}): going on with it" >&2
      [[ -n $dry_run ]] || sleep 30
      get_slice SUSPENDED
      running || { { [[ -z $fresh ]] || install; } && start "$@"; } || echo "that did not work: trying again" >&2
      pretended=0
    done
    ;;
esac
