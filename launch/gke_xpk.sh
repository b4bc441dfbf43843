#!/usr/bin/env bash
# A training run on TPU slices of a GKE cluster, through xpk (https://github.com/AI-Hypercomputer/xpk).
set -euo pipefail

usage() {
  cat <<'EOF'
launch/gke_xpk.sh --cluster CLUSTER --workload NAME --tpu-type TYPE [OPTIONS] -- COMMAND…

Starts COMMAND on every host of the slices; the cluster is one that `xpk cluster create` made.

  --num-slices N        slices, joined over the data-centre network (1)
  --docker-image IMAGE  image with svg_jax installed; by default the working tree is put into python:3.11 and installed
  --max-restarts K      restarts of all hosts together, after a preemption or a failure (10)
  --grace SECONDS       from SIGTERM to SIGKILL: what a save may take (120)
  --priority P          very-low, low, medium, high or very-high (medium)
  --project P --zone Z  of the cluster (by default gcloud's)
  --dry-run             print the xpk command

Logs: `xpk workload list --cluster CLUSTER` prints the page that shows them. To end it: `xpk workload delete`.
EOF
}

fail() {
  echo "error: $*" >&2
  exit 2
}

quoted() { # ARGUMENTS…: as a shell reads them
  local argument
  for argument; do
    if [[ $argument =~ ^[[:alnum:]_./:=@%+,-]+$ ]]; then printf '%s ' "$argument"; else printf '%s ' "${argument@Q}"; fi
  done
}

cluster='' workload='' tpu_type='' num_slices=1 docker_image='' max_restarts=10 grace=120 priority=medium
project='' zone='' dry_run=''
while (($#)); do
  case $1 in
    --help | -h) usage && exit ;;
    --dry-run) dry_run=1 && shift ;;
    --cluster | --workload | --tpu-type | --num-slices | --docker-image | --max-restarts | --grace | --priority | \
      --project | --zone)
      (($# > 1)) || fail "$1 needs a value"
      option=${1#--}
      declare "${option//-/_}=$2" && shift 2
      ;;
    --) shift && break ;;
    *) fail "unknown argument '$1': see --help" ;;
  esac
done
[[ -n $cluster && -n $workload && -n $tpu_type ]] || fail "--cluster, --workload and --tpu-type are needed: see --help"
(($#)) || fail "which command? gke_xpk.sh … -- COMMAND…"
for option in num_slices max_restarts grace; do
  [[ ${!option} =~ ^(0|[1-9][0-9]*)$ ]] || fail "--${option//_/-} is '${!option}': it must be a whole number"
done

# xpk runs the command in a subshell and sends that one SIGTERM: only by `exec` is it the command itself that gets it.
command="exec $(quoted "$@")"
image=("--docker-image=$docker_image")
if [[ -z $docker_image ]]; then
  image=("--base-docker-image=python:3.11" "--script-dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)")
  command="pip install -e '.[tpu]' && $command"
fi
place=()
[[ -z $project ]] || place+=("--project=$project")
[[ -z $zone ]] || place+=("--zone=$zone")

# A preempted run ends with code 75, which is a failure to Kubernetes: it restarts user code only if told to.
xpk=(xpk workload create "--cluster=$cluster" "--workload=$workload" "--tpu-type=$tpu_type" "--num-slices=$num_slices"
  "${image[@]}" "--max-restarts=$max_restarts" --restart-on-user-code-failure
  "--termination-grace-period-seconds=$grace" "--priority=$priority" "${place[@]}" "--command=${command% }")
if [[ -n $dry_run ]]; then
  quoted "${xpk[@]}"
  echo
else
  exec "${xpk[@]}"
fi
