# shellcheck shell=bash
# The virtual environment in .venv: made from a Python of 3.11 or later, made anew when it does not work
# any more, and filled by pip only when pyproject.toml or the Python has changed.

venv=$root/.venv
python=$venv/bin/python
unset PYTHONHOME PYTHONPATH # another environment's modules must not shine through

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The distribution's own Python where it will do, since its headers come from the package mirror.
find_python() {
  local candidate
  for candidate in ${LABKIT_PYTHON:-} /usr/bin/python3 python3.14 python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

# Adds to the caller's `wanted`: what makes a venv and compiles libvirt's module, if Python is the distribution's.
python_packages() {
  local found
  found=$(find_python) || found=/usr/bin/python3
  [[ $found != /usr/bin/* ]] || wanted+=(python3 python3-venv python3-dev)
}

venv_works() {
  [[ -x $python ]] && new_enough "$python" && "$python" -c 'import pip' 2>/dev/null || return 1
  # Its scripts name their Python by a full path, which a moved checkout breaks.
  head -n 3 "$venv/bin/pip" 2>/dev/null | grep -qF "$venv/bin/python"
}

wanted_stamp() {
  { cat "$root/pyproject.toml" && "$python" -VV && printf '%s\n' "$root"; } | sha256sum | cut -d ' ' -f 1
}

# python_env GROUP...: the environment, with labkit itself and these dependency groups.
# The stamp's first line is a hash of what was installed from, its others are the groups that are there.
python_env() {
  local stamp=$venv/.labkit-stamp groups=() have=() found group options=() name='Python environment'
  step_started=$(now)
  if [[ -e $venv && ! -O $venv ]]; then
    die "$venv belongs to another user, so packages cannot be installed there." \
      "sudo rm -r '$venv', and run ./lab again as yourself (it asks for sudo when it needs it)."
  fi
  if ! venv_works; then
    found=$(find_python) || die "No Python of version 3.11 or later is here." \
      "install one (sudo apt install python3 python3-venv), or name one by LABKIT_PYTHON=/path/to/python."
    rm -rf "$venv"
    step "$name" "see that $found can make environments (sudo apt install python3-venv), and that there is
    room on the disk (df -h '$root')." "$found" -m venv "$venv"
  fi
  if [[ -f $stamp ]]; then
    mapfile -t have <"$stamp"
  fi
  groups=("$@")
  for group in "${have[@]:1}"; do # what was there before stays up to date
    [[ " ${groups[*]} " == *" $group "* ]] || groups+=("$group")
  done
  if [[ ${have[0]:-} == "$(wanted_stamp)" && ${#groups[@]} -eq $((${#have[@]} - 1)) && -x $venv/bin/labkit ]]; then
    done_with "$name"
    return 0
  fi
  for group in "${groups[@]}"; do options+=(--group "$group"); done
  rm -f "$stamp"
  cd "$root"
  local remedy="see that this computer reaches PyPI, directly or by the mirror that pip is set up for
    (.venv/bin/pip config list), and run ./lab again."
  step 'pip itself' "$remedy" "$python" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
  step 'Python packages' "$remedy" "$python" -m pip install --quiet --disable-pip-version-check \
    --editable . "${options[@]}"
  # No questions about news when JupyterLab opens.
  mkdir -p "$venv/share/jupyter/lab/settings"
  printf '%s\n' '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' \
    >"$venv/share/jupyter/lab/settings/overrides.json"
  printf '%s\n' "$(wanted_stamp)" "${groups[@]}" >"$stamp"
}
