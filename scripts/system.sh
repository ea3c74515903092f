# shellcheck shell=bash
# System packages: which are needed, which are missing, and having them installed by one call of
# scripts/install-packages, the only thing that the launcher does as root.

packages_of() { # packages_of GROUP...: the names that these groups need on this architecture
  local architecture group wanted name why
  architecture=$(dpkg --print-architecture)
  while read -r group wanted name why; do
    [[ " $* " == *" $group "* ]] || continue
    [[ $wanted == any || $wanted == "$architecture" ]] && printf '%s\n' "$name"
  done < <(grep -v '^ *#' "$root/scripts/packages.txt")
  : "${why:-}"
}

# Of the packages given, those that are not installed. A package that another provides counts as there
# when dpkg says so of its own name only; apt sorts out the rest.
missing_of() {
  local -A there=()
  local name
  while read -r name; do there[${name%%:*}]=1; done < <(
    dpkg-query -W -f '${db:Status-Abbrev}${binary:Package}\n' -- "$@" 2>/dev/null | sed -n 's/^.i //p'
  )
  for name; do [[ -n ${there[$name]:-} ]] || printf '%s\n' "$name"; done
}

# apt-get download, by which guests get their packages, needs the lists; some container images remove them.
have_lists() {
  compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null
}

# system_packages NAME GROUP...: see to it that these groups' packages are there. Groups other than
# base bring what only developers need.
system_packages() {
  local what=$1 wanted missing=() lists=fresh how=()
  shift
  step_started=$(now)
  mapfile -t wanted < <(packages_of "$@")
  [[ " $* " != *' base '* ]] || python_packages
  mapfile -t missing < <(missing_of "${wanted[@]}")
  have_lists || lists=absent
  if ((${#missing[@]} == 0)) && [[ $lists == fresh ]]; then
    done_with "$what"
    return 0
  fi

  local by_hand="apt-get update && apt-get install --no-install-recommends ${missing[*]}"
  ((${#missing[@]})) || by_hand='apt-get update'
  if ((EUID == 0)); then
    how=()
  elif command -v sudo >/dev/null; then
    how=(sudo -p 'Password of %u, to install system packages: ')
    [[ ${assume_yes:-no} == no ]] || how+=(-n)
  else
    die "Packages are missing (${missing[*]:-package lists}), and installing them takes root or sudo: neither is here." \
      "have the computer's administrator run:  $by_hand"
  fi

  ((${#missing[@]} == 0)) || say "$dots installing with apt, and starting no service: ${missing[*]}"
  local marker='labkit: working as root' status=0
  try "$what" "${how[@]}" bash "$root/scripts/install-packages" "${missing[@]}" || status=$?
  if ((status != 0)); then
    local remedy="see that this computer reaches its package mirror and that no other installation runs, and run
    ./lab again; or have the administrator run:  $by_hand"
    if tail -n 3 "$log" | grep -qE 'sudo: .*(password|terminal)|not in the sudoers|not allowed to'; then
      remedy="run ./lab in a terminal as somebody who may use sudo, or have the administrator run:  $by_hand"
    fi
    failed "$what" "$status" "$remedy"
  fi
  done_with "$what" "${#missing[@]} installed"
}
