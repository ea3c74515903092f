# shellcheck shell=bash
# JupyterLab, on loopback alone, behind a token that no command line shows.

port_is_free() {
  "$python" - "$1" <<'PY'
import socket, sys
with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError:
        sys.exit(1)
PY
}

choose_port() { # sets port; $1 is the one asked for, or nothing
  local candidate
  if [[ -n $1 ]]; then
    port_is_free "$1" || die "Port $1 of 127.0.0.1 is taken by another program (or not yours to use)." \
      "choose another with --port, or leave --port out and a free one is found."
    port=$1
    return
  fi
  for ((candidate = 8888; candidate < 8938; candidate++)); do
    if port_is_free "$candidate"; then
      port=$candidate
      ((port == 8888)) || say "Port 8888 is taken, so JupyterLab is on port $port."
      return
    fi
  done
  die 'Ports 8888 to 8937 are all taken.' 'choose one with ./lab up --port N.'
}

first_notebook() {
  local name
  for name in notebooks/00-start-here.ipynb notebooks/03-your-first-vm.ipynb; do
    [[ ! -e $root/$name ]] || { printf '/tree/%s' "$name" && return; }
  done
}

# Kernels talk to the server by unix sockets: what a kernel prints could be read from a TCP port of loopback by
# every user of this computer. The path of such a socket must be short (107 bytes, 50 of them its name).
kernel_transport() {
  local folder
  folder=$("$python" -c 'from jupyter_core.paths import jupyter_runtime_dir; print(jupyter_runtime_dir())')
  if ((${#folder} > 56)); then folder=/tmp/labkit-jupyter-$EUID; fi
  (umask 077 && mkdir -p "$folder")
  [[ -O $folder ]] || die "$folder is not a folder of yours." 'remove it, or set JUPYTER_RUNTIME_DIR.'
  export JUPYTER_RUNTIME_DIR=$folder
}

# JupyterLab shows the stored output of notebooks that it does not trust without their styles. These are the
# course's own, in the checkout whose code is about to run.
trust_the_course() {
  local stamp=$venv/.trust-stamp
  if [[ -e $stamp && -z $(find "$root/notebooks" -maxdepth 1 -name '*.ipynb' -newer "$stamp" -print -quit) ]]; then
    return
  fi
  "$venv/bin/jupyter" trust "$root"/notebooks/*.ipynb >/dev/null 2>&1 || true
  touch "$stamp"
}

serve() { # serve PORT-OR-NOTHING
  local port='' page options=()
  choose_port "$1"
  page=/lab$(first_notebook)
  kernel_transport
  trust_the_course
  JUPYTER_TOKEN=$("$python" -c 'import secrets; print(secrets.token_hex(24))')
  export JUPYTER_TOKEN PATH="$venv/bin:$PATH"
  ((EUID != 0)) || options+=(--allow-root)
  # A browser opens by itself only for somebody who sits in front of this computer.
  if ((EUID == 0)) || [[ -z ${DISPLAY:-}${WAYLAND_DISPLAY:-} || -n ${SSH_CONNECTION:-} ]]; then options+=(--no-browser); fi

  ( # says where to go once the server answers
    deadline=$((SECONDS + 90))
    exec {pause}<> <(:)
    while kill -0 $$ 2>/dev/null && ((SECONDS < deadline)); do
      if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        printf '\nJupyterLab is ready. Open this address in a browser on this computer (Ctrl-C here ends it):\n\n' >&2
        printf '    http://127.0.0.1:%s%s?token=%s\n\n' "$port" "$page" "$JUPYTER_TOKEN"
        exit
      fi
      read -rt 0.2 -u "$pause" || true
    done
  ) 9>&- &
  cd "$root"
  exec 9>&-
  exec "$venv/bin/jupyter" lab --ServerApp.ip=127.0.0.1 --ServerApp.port="$port" --ServerApp.port_retries=0 \
    --ServerApp.root_dir="$root" --KernelManager.transport=ipc --LabApp.default_url="$page" --Application.log_level=WARN \
    --LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate "${options[@]}"
}
