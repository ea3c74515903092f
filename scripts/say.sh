# shellcheck shell=bash
# What the launcher says: one line a step with its time, everything else in a log file, and, when a step
# fails, its command, the last lines that it printed and what to do. All of it goes to stderr, so that
# stdout is the result's alone.

quiet=no # yes: finished steps that took no time are not mentioned
log=/dev/null

if [[ -t 2 && ${TERM:-dumb} != dumb ]]; then on_terminal=yes; else on_terminal=no; fi
case ${LC_ALL:-${LC_CTYPE:-${LANG:-}}} in
  *[Uu][Tt][Ff]*) tick='✓' cross='✗' dots='…' ;;
  *) tick='ok' cross='FAILED:' dots='...' ;;
esac

say() { printf '%s\n' "$*" >&2; }

# die SENTENCE [WHAT-TO-DO]: end with a plain sentence; for mistakes that need no log.
die() {
  say "$1"
  [[ -z ${2:-} ]] || say "What to do: $2"
  exit "${3:-1}"
}

open_log() {
  local folder
  if [[ -n ${LABKIT_HOME:-} ]]; then
    folder=$LABKIT_HOME/logs
  else
    folder=${XDG_STATE_HOME:-${HOME:-/root}/.local/state}/labkit/logs
  fi
  if (umask 077 && mkdir -p "$folder") 2>/dev/null && [[ -w $folder ]]; then
    # The last ten are kept: the names sort by time and hold no blanks.
    find "$folder" -maxdepth 1 -name 'lab-*.log' | sort -r | tail -n +10 | xargs -r -d '\n' rm -f
    log=$folder/lab-$(date +%Y%m%d-%H%M%S)-$$.log
  else
    log=$(mktemp "${TMPDIR:-/tmp}/lab-XXXXXXXX.log")
  fi
  (umask 077 && printf '%s  ./lab %s\n' "$(date -Is)" "$*" >"$log")
}

now() { printf '%s' "${EPOCHREALTIME/[.,]/}"; } # microseconds

since() {
  local us=$(($(now) - $1))
  printf '%d.%d s' $((us / 1000000)) $((us / 100000 % 10))
}

# The ticker shows that a step goes on, from its third second: a line that changes on a terminal, a new
# line every half minute elsewhere. While a password may be asked for (a marker is given), it waits until
# the marker is in the log.
ticker=
ticker_start() {
  local name=$1 awaited=${2:-} started
  started=$(now)
  (
    trap 'exit 0' TERM
    exec {pause}<> <(:) # reading from it is a sleep that starts no process
    shown=0
    while kill -0 $$ 2>/dev/null; do
      read -rt 0.3 -u "$pause" || true
      age=$((($(now) - started) / 1000000))
      if [[ -n $awaited ]]; then
        grep -qF -- "$awaited" "$log" || continue
        awaited=
      fi
      if [[ $on_terminal == yes ]]; then
        ((age < 2)) || printf '\r\033[K%s %s  %d s  \033[2m%s\033[0m' "$dots" "$name" "$age" \
          "$(tail -n 1 "$log" | tr -cd '[:print:]' | cut -c "1-$((${COLUMNS:-80} - ${#name} - 16))")"
      elif ((age >= 2 && (shown == 0 || age - shown >= 30))); then
        shown=$age
        printf '%s %s (%d s so far)\n' "$dots" "$name" "$age"
      fi
    done
  ) 9>&- >&2 2>/dev/null &
  ticker=$!
}

ticker_stop() {
  [[ -n $ticker ]] || return 0
  kill "$ticker" 2>/dev/null || true
  wait "$ticker" 2>/dev/null || true
  ticker=
  [[ $on_terminal == no ]] || printf '\r\033[K' >&2
}
trap ticker_stop EXIT

# try NAME COMMAND...: run a command with its output in the log; its exit status is the command's.
# Where `marker` is set, nothing is shown before it stands in the log.
step_started=0
try() {
  local name=$1 status=0
  shift
  step_started=$(now)
  step_command=$*
  printf '\n## %s\n$ %s\n' "$name" "$*" >>"$log"
  step_from=$(stat -c %s "$log")
  ticker_start "$name" "${marker:-}"
  "$@" >>"$log" 2>&1 </dev/null 9>&- || status=$?
  ticker_stop
  return "$status"
}

# done_with NAME [DETAIL]: the step's line.
done_with() {
  local took=$(($(now) - step_started))
  [[ $quiet == no || $took -gt 1500000 ]] || return 0
  say "$tick $1  $(since "$step_started")${2:+  ($2)}"
}

failed() { # failed NAME STATUS REMEDY
  say "$cross $1  $(since "$step_started")"
  say "  \$ $step_command"
  tail -c "+$((step_from + 1))" "$log" | tail -n 12 | sed 's/^/  | /' >&2
  say "  It ended with status $2."
  say "  What to do: $3"
  say "  The full log: $log"
  exit 1
}

# step NAME REMEDY COMMAND...
step() {
  local name=$1 remedy=$2 status=0
  shift 2
  try "$name" "$@" || status=$?
  ((status == 0)) || failed "$name" "$status" "$remedy"
  done_with "$name"
}

# confirm QUESTION: yes only when somebody typed it, or --yes was given.
confirm() {
  local answer=
  [[ ${assume_yes:-no} == no ]] || return 0
  [[ -t 0 ]] || die "$1 Nobody is there to answer." "run it in a terminal, or add --yes."
  read -rp "$1 [y/N] " answer
  [[ $answer == [Yy]* ]]
}
