#!/usr/bin/env bash
# A training run on a Cloud TPU slice, or on several: created or reused, installed, run, followed, resumed.
set -euo pipefail

usage() {
  cat <<'EOF'
launch/tpu_vm.sh run --name NAME --zone ZONE --type TYPE [OPTIONS] -- COMMAND…
launch/tpu_vm.sh logs|stop|delete --name NAME --zone ZONE [OPTIONS]

run     asks for the slice as a queued resource, or reuses it; copies what is committed here and installs it on all
        workers; starts COMMAND on all of them and follows the log of the first. 30 s after a preemption it goes on: a
        slice that is gone is asked for again. Losing this terminal ends nothing: the same line follows the run again.
logs    follows the log of the first worker
stop    has the run save and end (SIGTERM); a terminal that follows it ends too
delete  gives the slice back

  --type TYPE       accelerator, such as v5litepod-256, v5p-128 or v6e-256
  --slices N        slices of this type, joined over the data-centre network (1)
  --spot            preemptible capacity; --reserved: of a reservation
  --version V       software of the machines (by default the one for TYPE)
  --project P       Google Cloud project (by default gcloud's)
  --restarts K      start again up to K times after a failure that was no preemption (0)
  --dry-run         print every gcloud command of a run that is preempted once

Exit code: that of COMMAND on the first worker (75 if it was stopped), or 2 if gcloud refuses.
EOF
}

readonly EXIT_PREEMPTED=75
readonly REMOTE=svg_jax_run # folder on the workers
readonly PAUSE=30           # seconds between two looks at the slice, and before a restart
readonly TRIES=10           # failures of gcloud in a row that may pass, once it has given a slice

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
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || fail "--restarts is '$restarts': it must be a whole number from 0 on"
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

pause() {
  [[ -n $dry_run ]] || sleep "$PAUSE"
}

on_first() { # COMMAND: on the first worker of the first slice
  tpus tpu-vm ssh "${nodes[0]}" --worker=0 --command="$1"
}

everywhere() { # COMMAND: on all workers of all slices
  local node
  for node in "${nodes[@]}"; do tpus tpu-vm ssh "$node" --worker=all --command="$1" || return; done
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

describe() { # STATE-OF-A-DRY-RUN: the state of the slice, or ABSENT
  local messages state
  if [[ -n $dry_run ]]; then
    tpus queued-resources describe "$name" '--format=value(state.state)'
    echo "$1"
    return
  fi
  messages=$(mktemp)
  if state=$(tpus queued-resources describe "$name" '--format=value(state.state)' 2>"$messages"); then
    echo "$state"
  elif grep -q NOT_FOUND "$messages"; then
    echo ABSENT
  else
    cat "$messages" >&2
    rm "$messages"
    return 1
  fi
  rm "$messages"
}

fresh=''               # the slice was made by this script, and nothing is installed on it yet
failures=0 tolerated=0 # of gcloud, in a row
failed() { # WHAT
  ((failures++ < tolerated)) || fail "$1 (gcloud's message stands above)"
  echo "$1: trying again in $PAUSE s" >&2
}

get_slice() { # STATE-OF-A-DRY-RUN: waits until it is there
  local state pretended=$1 made=0
  while true; do
    state=$(describe "$pretended") || state=UNKNOWN
    case $state in
      ACTIVE)
        failures=0 tolerated=$TRIES
        return
        ;;
      UNKNOWN) failed "cannot ask for the state of slice $name" ;;
      ABSENT | FAILED | SUSPENDED | SUSPENDING) # it is not there yet, was preempted, or cannot be had
        if [[ $state == FAILED ]] && ((made >= 3)); then
          fail "slice $name was made $made times and failed: 'gcloud compute tpus queued-resources describe' says why"
        elif [[ $state != ABSENT ]] && ! delete; then
          failed "cannot delete slice $name, which is $state"
        else
          fresh=1 # even if this fails here: the request may have arrived
          if create; then made=$((made + 1)); else failed "cannot create slice $name"; fi
        fi
        ;;
      *)
        failures=0 tolerated=$TRIES
        echo "slice $name: $state" >&2
        ;;
    esac
    pretended=ACTIVE
    pause
  done
}

install() {
  local archive=/tmp/$REMOTE.tgz node
  [[ -n $dry_run ]] ||
    git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --format=tgz --output="$archive" HEAD || return
  for node in "${nodes[@]}"; do tpus tpu-vm scp "$archive" "$node:" --worker=all || return; done
  # The machines come with an older Python.
  everywhere "mkdir -p $REMOTE && tar -xzf $REMOTE.tgz -C $REMOTE && curl -LsSf https://astral.sh/uv/install.sh | sh \
&& cd $REMOTE && ~/.local/bin/uv venv --clear --python 3.11 && ~/.local/bin/uv pip install -e '.[tpu]'"
}

start() { # COMMAND…: detached, so that it outlives this terminal
  local script
  script=". .venv/bin/activate; $(quoted "$@"); echo \$? >run.exit"
  everywhere "cd $REMOTE && rm -f run.exit run.stopped && (setsid nohup bash -c ${script@Q} >run.log 2>&1 </dev/null &)"
}

prepare() { # COMMAND…
  install && start "$@" && fresh=''
}

follow() {
  on_first "cd $REMOTE && (tail -n 100 -F run.log & until [ -e run.exit ]; do sleep 5; done; kill \$!)" || true
}

# How the run stands on the first worker: `running`, its exit code (a second line says `stopped` if it was), `absent`
# where a machine was started anew, or nothing: the machine is gone, or only the connection to it.
look() { # ANSWER-OF-A-DRY-RUN
  local command="if [ -e $REMOTE/run.exit ]; then cat $REMOTE/run.exit $REMOTE/run.stopped; \
elif pgrep -u \$USER python >/dev/null; then echo running; else echo absent; fi"
  if [[ -n $dry_run ]]; then
    on_first "$command"
    echo "$1"
  else
    on_first "$command" 2>/dev/null || true
  fi
}

case $action in
  logs) follow ;;
  stop) # The mark comes first, so that a terminal that follows the run finds it when the run has ended.
    on_first "echo stopped >$REMOTE/run.stopped"
    everywhere "pkill -TERM -u \$USER python || echo nothing runs on \$HOSTNAME"
    ;;
  delete) delete ;;
  run)
    get_slice ABSENT
    if [[ -n $fresh || $(look absent) != *running ]]; then
      prepare "$@" || fail "cannot install and start the run on slice $name (gcloud's message stands above)"
    fi
    pretended=$EXIT_PREEMPTED
    while true; do
      follow
      found=$(look "$pretended")
      case $found in
        0*) exit 0 ;;
        *stopped)
          echo "the run was stopped: the same line goes on with it" >&2
          exit "${found%%$'\n'*}"
          ;;
        running | '') reason="the first worker does not answer" ;;
        absent) reason="the first worker was started anew" ;;
        "$EXIT_PREEMPTED") reason="the run was preempted" ;;
        *)
          ((restarts-- > 0)) || exit "$found"
          reason="the run ended with code $found"
          ;;
      esac
      echo "$reason: going on in $PAUSE s" >&2
      pause
      get_slice SUSPENDED
      if [[ -n $fresh ]]; then
        prepare "$@" || echo "that did not work: trying again" >&2
      elif [[ -n $found && $found != running && $(look "$found") == "$found" ]]; then # nobody stopped it meanwhile
        start "$@" || echo "that did not work: trying again" >&2
      fi
      pretended=0
    done
    ;;
esac
