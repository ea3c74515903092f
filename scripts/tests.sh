# shellcheck shell=bash
# ./lab test and ./lab lint.

parts_known='quick unit integration notebooks browser soak distros'

in_ci() { [[ ${CI:-} == true || ${CI:-} == 1 ]]; }

# developer_packages GROUP...: what a developer's tools need. Somebody who cannot install goes without
# (the tests say what they lacked); in CI nothing may be missing.
developer_packages() {
  local wanted missing
  mapfile -t wanted < <(packages_of "$@")
  mapfile -t missing < <(missing_of "${wanted[@]}")
  ((${#missing[@]})) || return 0
  if ((EUID != 0)) && ! in_ci && ! { command -v sudo >/dev/null && { [[ -t 0 ]] || sudo -n true 2>/dev/null; }; }; then
    say "$dots going without ${missing[*]} (no way to install here)"
    return 0
  fi
  system_packages "packages for ${*}" "$@"
}

# run_pytest PART [ARGUMENTS]: one pytest session; remembers whether it failed.
run_pytest() {
  local part=$1 status=0
  shift
  say ''
  say "── $part ──"
  LABKIT_TEST_PART=$part "$python" -m pytest "$@" "${extra[@]}" || status=$?
  case $status in
    0 | 5) ;; # 5: nothing there to run, which the sum below judges
    *) worst=$status ;;
  esac
  ((status != 2)) || interrupted=yes
}

# A folder of tests, unless paths were named after --.
where() {
  local argument
  for argument in "${extra[@]}"; do
    [[ ! -e ${argument%%::*} ]] || return 0
  done
  printf '%s\n' "$1"
}

run_part() {
  local part=$1 workers=() target=()
  case $part in
    unit) workers=(-n "${LABKIT_TEST_WORKERS:-auto}") ;; # no hypervisor: side by side
    *) workers=(-n 0) ;;                                   # real machines: their times are judged, so one at a time
  esac
  case $part in
    quick)
      run_part unit
      [[ ! -d tests/integration ]] || run_pytest 'integration (smoke)' -n 0 -m smoke tests/integration
      ;;
    soak)
      export LABKIT_SOAK=1
      for part in unit integration notebooks browser; do run_part "$part"; done
      ;;
    distros) LABKIT_DISTROS=1 run_pytest distros -n 0 -s tests/distros ;;
    *)
      mapfile -t target < <(where "tests/$part")
      if [[ -d tests/$part ]]; then run_pytest "$part" "${workers[@]}" "${target[@]}"; fi
      ;;
  esac
}

command_test() {
  local parts=() extra=() part worst=0 interrupted=no
  while (($#)); do
    if [[ $1 == -- ]]; then
      shift
      extra=("$@")
      break
    fi
    [[ " $parts_known " == *" $1 "* ]] ||
      die "There is no part '$1' of the tests." "choose from: $parts_known; what is for pytest comes after --." 2
    parts+=("$1")
    shift
  done
  ((${#parts[@]})) || parts=(unit integration notebooks browser)

  local started
  started=$(now)
  if [[ ${parts[*]} =~ ^(unit|distros)$ ]]; then # no machine runs here: no guest is built
    open_log test "${parts[@]}"
    one_at_a_time
    system_packages 'system packages' base
    python_env test
    exec 9>&-
  else
    bring_up test
  fi
  test_needs "${parts[@]}"

  cd "$root"
  LABKIT_TEST_RESULTS=$(mktemp)
  export LABKIT_TEST_RESULTS
  for part in "${parts[@]}"; do
    [[ $interrupted == yes ]] || run_part "$part"
  done
  stop_needs
  say ''
  say "Tests took $(since "$started")."
  # The closing lines: what did not run and why, then the sum.
  "$python" scripts/test_summary.py "$LABKIT_TEST_RESULTS" || { ((worst)) || worst=$?; }
  rm -f "$LABKIT_TEST_RESULTS"
  return "$worst"
}

# --- What tests with marks need beyond ./lab up ----------------------------------------------------

tests_with_mark() { grep -rqE "mark\.$1\b" "$root/tests" --include='test_*.py'; }

test_needs() {
  [[ ! " $* " =~ \ (integration|browser|notebooks|soak)\  ]] && return 0
  if tests_with_mark browser; then developer_packages browser; fi
  if tests_with_mark docker && ! docker_answers; then
    # A container engine is for its owner to choose: only a CI machine that has none gets one, as root.
    if in_ci && ((EUID == 0)); then
      command -v dockerd >/dev/null || developer_packages docker
      start_docker
    fi
  fi
}

docker_answers() {
  "$python" -c 'import docker; docker.from_env(timeout=5).ping()' >/dev/null 2>&1
}

# A daemon of the tests' own, which ends with them: its socket, images and containers are all in one folder.
docker_home=
docker_pid=
docker_bridge=
start_docker() {
  local path='' i
  path=$(command -v dockerd) || return 0 # the tests say what is missing
  docker_home=$(mktemp -d /tmp/lk-docker-XXXXXX)
  export DOCKER_HOST=unix://$docker_home/docker.sock
  [[ -e /sys/class/net/docker0 ]] || docker_bridge=ours
  # No rule of this computer's firewall is changed, so containers reach one another and nothing else.
  "$path" --iptables=false --ip6tables=false --host "$DOCKER_HOST" --data-root "$docker_home/data" --exec-root "$docker_home/exec" \
    --pidfile "$docker_home/pid" >"$docker_home/log" 2>&1 </dev/null &
  docker_pid=$!
  trap 'ticker_stop; stop_needs' EXIT
  for ((i = 0; i < 150; i++)); do
    if docker_answers; then
      say "$tick a Docker daemon for the tests"
      return 0
    fi
    kill -0 "$docker_pid" 2>/dev/null || break
    sleep 0.2
  done
  say "$cross the Docker daemon for the tests did not come up; its last lines:"
  tail -n 5 "$docker_home/log" | sed 's/^/  | /' >&2
}

stop_needs() {
  [[ -n $docker_home ]] || return 0
  kill "$docker_pid" 2>/dev/null || true
  wait "$docker_pid" 2>/dev/null || true
  # Never remove through a mount.
  if grep -q " $docker_home/" /proc/self/mounts; then
    say "(mounts are left below $docker_home, so it stays)"
  else
    rm -rf "$docker_home"
  fi
  [[ $docker_bridge != ours ]] || ip link delete docker0 2>/dev/null || true
  docker_home=
}

command_lint() {
  local bad=()
  open_log lint
  one_at_a_time
  quiet=yes
  developer_packages lint
  system_packages 'system packages' base
  python_env lint test
  exec 9>&-
  quiet=no
  cd "$root"
  check() { # check NAME COMMAND...
    local name=$1 status=0
    shift
    try "$name" "$@" || status=$?
    if ((status)); then
      say "$cross $name  $(since "$step_started")"
      tail -c "+$((step_from + 1))" "$log" | sed 's/^/  | /' >&2
      bad+=("$name")
    else
      done_with "$name"
    fi
  }
  local fix=()
  [[ ${1:-} != --fix ]] || fix=(--fix)
  if ((${#fix[@]})); then
    check 'format' "$venv/bin/ruff" format .
  else
    check 'format (./lab lint --fix mends it)' "$venv/bin/ruff" format --check .
  fi
  check 'lint' "$venv/bin/ruff" check "${fix[@]}" .
  check 'types' "$venv/bin/mypy"
  check 'layers' "$venv/bin/lint-imports"
  if command -v shellcheck >/dev/null; then
    check 'shell' shellcheck -xa lab scripts/install-packages .ci/run
  fi
  if ((${#bad[@]})); then
    say "Not clean: ${bad[*]}."
    return 1
  fi
}
