# Sourced by scripts/serve, scripts/test and scripts/check: makes .venv and installs what is asked for, once.
#
#   bootstrap EXTRA     EXTRA is "" (run time only) or "dev"; sets $venv
#
# A stamp in the venv names what was installed, from which pins, by which Python: when nothing changed, this takes
# a few milliseconds. $PYTHON chooses the interpreter of a new venv, $PAGEFLIGHT_VENV another place for it.

pytriton_pin="nvidia-pytriton==0.7.0" # NVIDIA's tritonserver, its Python backend and nothing else of the package is used
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${PAGEFLIGHT_VENV:-$root/.venv}
lock=$root/scripts/requirements.lock

say() { printf '%s\n' "$*" >&2; }
die() { printf '%s\n' "$@" >&2; exit 1; }

python_fits() { # PYTHON: is it CPython 3.10 - 3.13 on x86-64 Linux?
  "$1" -c '
import platform, sys
ok = (3, 10) <= sys.version_info[:2] <= (3, 13) and sys.implementation.name == "cpython" and sys.maxsize > 2**32
sys.exit(not (ok and sys.platform == "linux" and platform.machine() == "x86_64"))' 2>/dev/null
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    python_fits "$PYTHON" || die "PYTHON=$PYTHON is not CPython 3.10 - 3.13 on x86-64 Linux." \
      "Unset PYTHON, or point it at another interpreter."
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.12 python3.11 python3.13 python3.10; do
    if command -v "$candidate" >/dev/null && python_fits "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  die "No suitable Python: pageflight needs CPython 3.10 - 3.13 on x86-64 Linux (found: $(python3 --version 2>&1 || true))." \
    "On Debian and Ubuntu: sudo apt install python3 python3-venv.  Or point PYTHON at one: PYTHON=/path/to/python3.12 $0"
}

make_venv() {
  local python
  python=$(find_python) || exit 1
  say "Creating $venv with $("$python" --version 2>&1) ($python)"
  if "$python" -c 'import ensurepip' 2>/dev/null && "$python" -m venv --clear "$venv"; then return; fi
  # Debian and Ubuntu ship Python without ensurepip unless python3-venv is installed: two other ways lead there.
  if "$python" -m virtualenv --version >/dev/null 2>&1; then "$python" -m virtualenv -q --clear "$venv" && return; fi
  if command -v virtualenv >/dev/null; then virtualenv -q --clear -p "$python" "$venv" && return; fi
  if "$python" -m pip --version >/dev/null 2>&1 && "$python" -m venv --clear --without-pip "$venv" &&
    "$python" -m pip --python "$venv/bin/python" install -q pip 2>/dev/null; then return; fi
  rm -rf "$venv"
  die "Python's venv module is not complete on this machine. Install it, then start again:" \
    "  sudo apt install python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
}

draw() { # DONE TOTAL TEXT: one line that redraws itself; nothing where there is no terminal
  [ -t 2 ] || return 0
  local done=$1 total=$2 width=28 filled
  [ "$done" -le "$total" ] || done=$total
  filled=$((done * width / total))
  printf '\r\033[K  [%s%s] %d/%d %s' "$(printf '%*s' "$filled" '' | tr ' ' '#')" \
    "$(printf '%*s' $((width - filled)) '' | tr ' ' '.')" "$done" "$total" "$3" >&2
}

watch_pip() { # TOTAL: reads pip's output, draws progress
  local total=$1 seen=" " count=0 line name text="resolving" start=$SECONDS
  while :; do
    if IFS= read -r -t 1 line; then
      case $line in
        Collecting* | "Requirement already satisfied:"*)
          name=${line#Collecting }
          name=${name#Requirement already satisfied: }
          name=${name%%[ =<>\[;!~]*}
          case $seen in *" $name "*) ;; *) seen+="$name " count=$((count + 1)) text=$name ;; esac ;;
        "Installing collected packages"*) text="installing" ;;
      esac
    elif [ $? -le 128 ]; then
      break # end of pip's output; above 128 it was only the timeout
    fi
    draw "$count" "$total" "$text ($((SECONDS - start)) s)"
  done
  if [ -t 2 ]; then printf '\r\033[K' >&2; fi
}

pip_install() { # TOTAL ARGUMENTS…
  local total=$1 log=$venv/install.log
  shift
  printf '\n$ pip install %s\n' "$*" >>"$log"
  if ! { "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off "$@" 2>&1 </dev/null |
    tee -a "$log" | watch_pip "$total"; }; then
    tail -n 15 "$log" >&2
    die "" "Installing failed (the last lines are above, all of it is in $log)." \
      "Check the network and pip's index settings (pip config list), then start again: it continues where it stopped."
  fi
}

has_tritonserver() {
  [ -n "${TRITONSERVER:-}" ] || command -v tritonserver >/dev/null || [ -x /opt/tritonserver/bin/tritonserver ]
}

bootstrap() {
  local extra=$1 wanted stamp target total start=$SECONDS
  set -o pipefail
  if ! { [ -x "$venv/bin/python" ] && python_fits "$venv/bin/python"; }; then make_venv; fi
  stamp=$venv/.pageflight-${extra:-run}
  wanted=$(cat "$root/pyproject.toml" "$lock" "${BASH_SOURCE[0]}" | sha256sum | cut -d' ' -f1)
  wanted+=" $root $(has_tritonserver && echo own || echo wheel)"
  # The developer's set contains the run-time set, so its stamp is good for both.
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] || [ "$(cat "$venv/.pageflight-dev" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  if [ "$extra" = dev ]; then
    total=$(sed -nE 's/^([a-z0-9-]+)==.*/\1/p' "$lock" | sort -u | wc -l)
    say "Installing pageflight for development: $total pinned packages, once (log: $venv/install.log)"
  else
    total=$(sed '/^# dev/,$d' "$lock" | sed -nE 's/^([a-z0-9-]+)==.*/\1/p' | sort -u | wc -l)
    say "Installing pageflight: $total pinned packages, once (log: $venv/install.log)"
  fi
  target=$root
  [ -z "$extra" ] || target="$root[$extra]"
  pip_install "$total" --editable "$target" --constraint "$lock"
  # Only the server's binaries are used: its Python dependencies (an older numpy among them) are left out.
  has_tritonserver || pip_install 1 --no-deps "$pytriton_pin"
  printf '%s\n' "$wanted" >"$stamp"
  say "Installed in $((SECONDS - start)) s."
}
