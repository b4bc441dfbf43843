#!/usr/bin/env bash
# One job of several processes on this machine, over loopback: what a cluster does, without one.
set -euo pipefail

usage() {
  cat <<'EOF'
launch/local_cluster.sh [OPTIONS] N -- COMMAND…

Starts COMMAND in N processes that find each other over loopback. Process 0 writes to the terminal, the others after
their number. When one dies, says which and how, and ends the others. SIGTERM and Ctrl-C are passed on: the processes
save and end; a second one kills them.

  --devices D    devices in each process (1)
  --logs DIR     write DIR/1.log … instead of mixing the output of the processes; DIR/0.pid … hold their process ids
  --restarts K   start again up to K times after a preemption or a failure (0)
  --grace S      seconds that the others get to end by themselves once one has died (30)
  --dry-run      print what would be started

Exit code: 0, or 75 if the job was preempted and saved, or that of the first process that failed (128 + its signal).
EOF
}

readonly EXIT_PREEMPTED=75

fail() {
  echo "error: $*" >&2
  exit 2
}

number() { # NAME VALUE LEAST
  if ! [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || (($2 < $3)); then
    fail "$1 is '$2': it must be a whole number from $3 on"
  fi
}

processes='' devices=1 logs='' restarts=0 grace=30 dry_run=''
while (($#)); do
  case $1 in
    --help | -h) usage && exit ;;
    --dry-run) dry_run=1 && shift ;;
    --devices | --logs | --restarts | --grace)
      (($# > 1)) || fail "$1 needs a value"
      declare "${1#--}=$2" && shift 2
      ;;
    --) shift && break ;;
    -*) fail "unknown option $1: see --help" ;;
    *)
      [[ -z $processes ]] || fail "'$1' comes where -- was expected: local_cluster.sh N -- COMMAND…"
      processes=$1 && shift
      ;;
  esac
done
[[ -n $processes ]] || fail "how many processes? local_cluster.sh N -- COMMAND…"
(($#)) || fail "which command? local_cluster.sh N -- COMMAND…"
number N "$processes" 1
number --devices "$devices" 1
number --restarts "$restarts" 0
number --grace "$grace" 0

# One thread a device: with more, CPU devices begin their collectives in different orders, and may wait for one another
# for ever.
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_cpu_multi_thread_eigen=false"

free_port() {
  local port
  while port=$((10000 + RANDOM % 20000)); (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

settings() { # PORT INDEX
  echo "JAX_COORDINATOR_ADDRESS=127.0.0.1:$1" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$2" \
    "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "JAX_NUM_CPU_DEVICES=$devices"
}

if [[ -n $dry_run ]]; then
  for ((index = 0; index < processes; index++)); do
    printf '%s%s\n' "$(settings PORT "$index")" "$(printf ' %q' "$@")"
  done
  exit
fi

how() { # CODE
  local signal
  if (($1 > 128)) && signal=$(kill -l "$1" 2>/dev/null); then
    echo "was killed by SIG$signal"
  elif (($1 == EXIT_PREEMPTED)); then
    echo "was preempted: it saved and ended"
  else
    echo "ended with exit code $1"
  fi
}

set -m                # each process leads a group
declare -A running=() # process id -> index
told=0                # how often this script was told to end

end() { # what is left, with the processes that it started
  local pid
  for pid in "${!running[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
}

pass_on() {
  told=$((told + 1))
  if ((told > 1)); then
    end
  elif ((${#running[@]})); then
    kill -TERM "${!running[@]}" 2>/dev/null || true
  fi
}
trap pass_on TERM INT

start() { # INDEX COMMAND…
  local index=$1 variables
  shift
  read -ra variables <<<"$(settings "$port" "$index")"
  if ((index == 0)); then
    env "${variables[@]}" "$@" &
  elif [[ -n $logs ]]; then
    env "${variables[@]}" "$@" >"$logs/$index.log" 2>&1 &
  else
    env "${variables[@]}" "$@" > >(sed -u "s/^/[$index] /") 2>&1 &
  fi
  running[$!]=$index
  [[ -z $logs ]] || echo $! >"$logs/$index.pid"
}

run() { # COMMAND…: the exit code of the job in $result
  local port index pid code timer=''
  port=$(free_port)
  result=0
  for ((index = 0; index < processes; index++)); do start "$index" "$@"; done
  while ((${#running[@]})); do
    pid='' code=0
    # shellcheck disable=SC2086 # no timer, no argument
    wait -n -p pid $timer "${!running[@]}" 2>/dev/null || code=$?
    if [[ -z ${pid:-} ]]; then # a signal came; the shell may have noted the end of a process meanwhile
      for pid in "${!running[@]}"; do
        kill -0 "$pid" 2>/dev/null || break
        pid=''
      done
      [[ -n ${pid:-} ]] || continue
      code=0
      wait "$pid" || code=$?
    fi
    if [[ $pid == "$timer" ]]; then
      echo "ending the processes ${running[*]}, which go on after $grace s" >&2
      end
      timer=''
      continue
    fi
    index=${running[$pid]}
    unset "running[$pid]"
    ((code)) || continue
    if ((result == 0 || result == EXIT_PREEMPTED && code != EXIT_PREEMPTED)); then
      result=$code
      echo "process $index of $processes $(how "$code")" >&2
    fi
    if [[ -z $timer ]] && ((${#running[@]})); then
      sleep "$grace" &
      timer=$!
    fi
  done
  [[ -z $timer ]] || kill "$timer" 2>/dev/null || true
}

[[ -z $logs ]] || mkdir -p "$logs"
for ((attempt = 0; ; attempt++)); do
  run "$@"
  ((result != 0 && attempt < restarts && told == 0)) || exit "$result"
  echo "starting again ($((attempt + 1)) of $restarts)" >&2
done
