# Sourced by the other scripts: makes .venv with what a task needs, once. prepare_environment EXTRAS [system packages ...]
# A second run with unchanged requirements installs nothing.

fail() { # exit status, message
  printf '%s\n' "$2" >&2
  exit "$1"
}

find_python() {
  local candidate
  for candidate in ${ARCFACE_PYTHON:-python3.12 python3.11 python3.10 python3}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail 3 "no usable Python: expected 3.10, 3.11 or 3.12 with venv, found $(python3 --version 2>&1 || echo none).
Next: apt-get install python3 python3-venv, or name one: ARCFACE_PYTHON=/path/to/python3.11 $0"
}

# One ONNX Runtime, never two: three packages share its import name.
onnxruntime_package() {
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo 'onnxruntime-gpu[cuda,cudnn]' # the extras bring the libraries that the provider does not start without
  elif [ "$(uname -sm)" = "Linux x86_64" ]; then
    echo onnxruntime-openvino # the CPU provider of the plain package, plus OpenVINO's bf16 and int8
  else
    echo onnxruntime
  fi
}

require_tritonserver() { # before anything is downloaded: the wheel that holds one is for Linux x86-64
  local host
  host=$(uname -sm)
  [ "$host" = "Linux x86_64" ] || command -v tritonserver >/dev/null ||
    fail 3 "nothing was installed: no tritonserver is on PATH, and the wheel that holds one is for Linux x86_64; this is $host.
Next: start it where a tritonserver is (NGC's image has one for arm64), or install what runs here: docs/install.md, \"arm64\""
}

parts_of() { # extras less the ONNX Runtime and the InsightFace that they would bring: both are installed by themselves
  local extra
  for extra in ${1//,/ }; do
    case $extra in build) echo tools ;; serve) echo triton ;; reference) echo reference-needs ;; *) echo "$extra" ;; esac
  done | paste -sd,
}

install_system_packages() { # only what is missing; installed as root with apt, otherwise named
  local package missing=()
  for package in "$@"; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing system packages: ${missing[*]}" >&2
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null && return 0
  fi
  echo "note: system packages not installed: ${missing[*]} (what needs them is skipped). Next: sudo apt-get install ${missing[*]}" >&2
}

has_shared_python() { # the Python stub of tritonserver links it
  .venv/bin/python - <<'PY'
import ctypes, pathlib, sys, sysconfig
name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
for place in (pathlib.Path(sysconfig.get_config_var("LIBDIR") or "") / name, name):
    try:
        ctypes.CDLL(str(place))
    except OSError:
        continue
    sys.exit(0)
sys.exit(1)
PY
}

installed() { # extras, checksum of the requirements: whether an earlier run installed at least these
  local stamp have extra
  for stamp in .venv/.installed-*-"$2"; do
    [ -e "$stamp" ] || continue
    have=${stamp#.venv/.installed-} have=,${have%-"$2"},
    for extra in ${1//,/ }; do
      [[ $have == *",$extra,"* ]] || continue 2
    done
    return 0
  done
  return 1
}

pip_install() { # pip's arguments; what pip says goes to .venv/install.log, and here one line that says how far it is
  local line downloads=0
  .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt "$@" 2>&1 |
    while IFS= read -r line; do
      printf '%s\n' "$line" >>.venv/install.log
      case $line in
        *"Downloading "* | *"Using cached "*) downloads=$((downloads + 1)) line="package $downloads: ${line##*ing }" ;;
        "Installing collected packages:"*) line="unpacking what was downloaded: $(wc -w <<<"${line#*:}")" ;;
        *) continue ;;
      esac
      if [ -t 2 ]; then printf '\r\033[K  %.76s' "$line" >&2; elif [[ $line == *" MB)" || $line == unpack* ]]; then echo "  $line" >&2; fi
    done
}

megabytes_in_log() { # what pip downloaded: "  Downloading name.whl (55.2 MB)" or (812 kB)
  awk '/Downloading .*MB\)/ { sum += substr($(NF - 1), 2) } /Downloading .*kB\)/ { sum += substr($(NF - 1), 2) / 1000 }
    END { printf "%.0f", sum }' .venv/install.log
}

prepare_environment() {
  local extras=$1 python stamp wanted started=$SECONDS
  shift
  [ $# -eq 0 ] || install_system_packages "$@"
  wanted=$(cat pyproject.toml constraints.txt scripts/environment.sh | cksum | cut -d' ' -f1)
  stamp=.venv/.installed-$extras-$wanted
  if ! installed "$extras" "$wanted"; then
    if [ ! -x .venv/bin/python ]; then
      python=$(find_python) || exit $?
      echo "making .venv with $("$python" --version)" >&2
      "$python" -m venv .venv || fail 3 "cannot make .venv with $python. Next: apt-get install python3-venv"
    fi
    has_shared_python || install_system_packages "$(.venv/bin/python -c 'import sys; print("libpython%d.%d" % sys.version_info[:2])')"
    echo "installing what $0 needs ($extras) into .venv: a first run downloads about 360 MB (more with a GPU), one to three minutes" >&2
    : >.venv/install.log
    # InsightFace without its requirements: it wants a second ONNX Runtime, and an OpenCV that needs a display library.
    if ! pip_install -e ".[$(parts_of "$extras")]" "$(onnxruntime_package)" || ! pip_install --no-deps insightface; then
      [ ! -t 2 ] || echo >&2
      fail 3 "installing failed; all that pip said is in .venv/install.log, and its last words were:
$(grep -v '^ *$' .venv/install.log | tail -n 3 | sed 's/^/  /')
Next: check the network and the free disk space, then run $0 again"
    fi
    [ ! -t 2 ] || printf '\r\033[K' >&2
    echo "installed in $((SECONDS - started)) s, $(megabytes_in_log) MB downloaded. To have \`arcface\` in this shell: source .venv/bin/activate" >&2
    touch "$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
}
