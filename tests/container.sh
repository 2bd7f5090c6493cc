#!/usr/bin/env bash
# Builds the image, runs docker-compose.yml as it stands, and asks a real ssh client what it got.
# Uses its own project name and a free port of 127.0.0.1, and takes all of it away at the end.
# Nothing here waits for a fixed time: every wait is for something that can be seen, with a deadline.
set -euo pipefail
cd "$(dirname "$0")/.."
exec </dev/null    # nobody types into docker or ssh by accident
trap : PIPE        # to talk to a client that has gone is a failed check, not our end

passed=0 failed=0 container=
ok()     { passed=$((passed + 1)); echo "ok - $1"; }
not_ok() { failed=$((failed + 1)); printf 'not ok - %s\n  expected: %s\n  got:      %s\n' "$@"; }
is()     { if [[ $2 == "$3" ]]; then ok "$1"; else not_ok "$1" "$3" "$2"; fi; }
like()   { if [[ $2 == *"$3"* ]]; then ok "$1"; else not_ok "$1" "…$3…" "$2"; fi; }
unlike() { if [[ $2 != *"$3"* ]]; then ok "$1"; else not_ok "$1" "nothing of: $3" "$2"; fi; }
within() { timeout --foreground "$@"; }  # in the foreground, so that ^C ends it too
die()    { echo "container.sh: $*" >&2; exit 1; }

within 20 docker info >/dev/null 2>&1 ||
  die "docker does not answer; start the engine, or see whether you may use it: docker info"
COMPOSE=(docker compose)
within 20 docker compose version >/dev/null 2>&1 || COMPOSE=(docker-compose)

# The project name keeps us away from a server that you run from the same folder.
export COMPOSE_PROJECT_NAME=gosshd-test-$$ COMPOSE_FILE=docker-compose.yml TERM=xterm-256color
GOSSHD_PORT=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
export GOSSHD_PORT
work=$(mktemp -d)

compose() { within 120 "${COMPOSE[@]}" "$@"; }
inside()  { compose exec -T gosshd "$@" 2>&1 || true; }  # as the container's root
inspect() { within 20 docker inspect -f "$1" "$container"; }

# known_hosts holds the one key that we were told, so another one is refused.
OPTIONS=(-F /dev/null -o "Port=$GOSSHD_PORT" -o "UserKnownHostsFile=$work/known_hosts"
         -o GlobalKnownHostsFile=/dev/null -o StrictHostKeyChecking=yes -o BatchMode=yes -o LogLevel=ERROR)
SSH=(ssh "${OPTIONS[@]}" alice@127.0.0.1)
lab()    { within 30 "${SSH[@]}" "$@" 2>&1 || true; }
lab_tt() { lab -tt "$@" | tr -d '\r'; }

cleanup() {
  status=$?
  trap - EXIT
  if ((status)) && [[ $container ]]; then within 20 docker logs --tail 20 "$container" >&2 || true; fi
  end_client
  compose down --volumes --rmi local --timeout 5 >"$work/down" 2>&1 || cat "$work/down" >&2
  rm -rf "$work"
  exit "$status"
}
trap cleanup EXIT
trap 'echo "container.sh: line $LINENO: failed: $BASH_COMMAND" >&2' ERR
trap 'exit 130' INT TERM

# eventually SECONDS COMMAND…: true as soon as the command is, false after so many seconds.
eventually() {
  local deadline=$((SECONDS + $1))
  until "${@:2}"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.2
  done
}

start() {
  compose up -d >"$work/up" 2>&1 || die "up failed: $(cat "$work/up")"
  container=$(compose ps -a -q gosshd)
  eventually 60 healthy || die "not healthy after 60 s: $(inspect '{{json .State}}')"
  ok "$1"
  # Ask the server over a way that the network cannot forge, as an administrator would.
  compose exec -T gosshd gosshd known-hosts --listen "127.0.0.1:$GOSSHD_PORT" >"$work/known_hosts" ||
    die "gosshd known-hosts does not tell the host key"
}
healthy() { [[ $(inspect '{{.State.Health.Status}}') == healthy ]]; }

# open COMMAND: an ssh client in a terminal session that stays; say and expect talk with it.
open() {
  coproc { exec timeout --foreground 90 "${SSH[@]}" -tt "$@" 2>&1; }
  exec {from}<&"${COPROC[0]}" {to}>&"${COPROC[1]}"
  said=
}
say() { printf '%b' "$1" >&"$to" || true; } 2>/dev/null  # a client that has gone says nothing back
expect() {  # a line that holds $1
  local line deadline=$((SECONDS + 30))
  while ((SECONDS < deadline)) && IFS= read -r -t 30 -u "$from" line; do
    said+=$line$'\n'
    [[ $line != *"$1"* ]] || return 0
  done
  return 1
}
hang_up() {
  end_client
  exec {from}<&- {to}>&-
}
end_client() {  # our only background job; a job that is over is not listed, so its number is safe
  local pid
  for pid in $(jobs -p -r); do kill "$pid" 2>/dev/null || true; done
  wait
}

# -- the image and the start ----------------------------------------------------------------------

echo "building the image (a minute or two the first time)"
within 900 "${COMPOSE[@]}" build >"$work/build" 2>&1 || die "the build failed: $(tail -n 40 "$work/build")"
start "the container becomes healthy"
image=$(inspect '{{.Image}}')
is "the image holds no host key" \
  "$(within 60 docker run --rm --network none --entrypoint ls "$image" -A /var/lib/gosshd/hostkeys 2>&1)" ""
is "the port is published on 127.0.0.1 only" \
  "$(inspect '{{range .NetworkSettings.Ports}}{{range .}}{{.HostIp}}:{{.HostPort}} {{end}}{{end}}')" "127.0.0.1:$GOSSHD_PORT "
identification() {
  (exec 3<>"/dev/tcp/127.0.0.1/$GOSSHD_PORT" && IFS= read -r -t 10 line <&3 && echo "$line") 2>&1 || true
}
like "the port answers" "$(identification)" SSH-2.0-

# -- who one is in there --------------------------------------------------------------------------

server=$(inside pgrep -o -x gosshd)
is "whoami is lab" "$(lab whoami)" lab
is "whoami is lab in a terminal" "$(lab_tt whoami)" lab
is "the server runs as another user" "$(inside stat -c %U "/proc/$server") $(lab id -un)" "root lab"
is '$USER is the login name' "$(lab 'echo $USER')" alice
is "a session starts in /home/lab" "$(lab pwd)" /home/lab
is "the exit status comes back" "$(within 30 "${SSH[@]}" 'exit 7' && echo 0 || echo $?)" 7
is "characters are UTF-8" "$(lab 'printf Ü | wc -m; locale charmap')" $'1\nUTF-8'
is "the terminal belongs to lab" "$(lab_tt 'stat -c "%U %G %a" "$(tty)"')" "lab tty 620"

for tool in less vi git rsync /usr/lib/openssh/sftp-server ps tmux; do
  like "$tool is there" "$(lab "command -v $tool || echo no $tool")" "/${tool##*/}"
done
lab_tt "tmux new-session 'tmux display-message -p \"in #S\" >tmux.out; tty >>tmux.out'" >"$work/tmux"
like "tmux starts a session" "$(lab cat tmux.out) $(<"$work/tmux")" $'in 0\n/dev/pts/'
# There is no subsystem, but `sftp -s PATH` runs a server of one's choice.
printf 'put %s sent\nget sent %s\n' "$work/known_hosts" "$work/back" >"$work/batch"
within 30 sftp -s /usr/lib/openssh/sftp-server -b "$work/batch" "${OPTIONS[@]}" alice@127.0.0.1 >"$work/sftp" 2>&1 || true
if cmp -s "$work/known_hosts" "$work/back"; then ok "sftp brings a file there and back"; else
  not_ok "sftp brings a file there and back" "the same file" "$(<"$work/sftp")"; fi

open
say "sh -c 'echo run''ning; read line; echo got the \$line'\n"
if expect running && say '\032' && expect Stopped && say 'fg\nline\nexit\n' && expect "got the line" && expect logout; then
  ok "job control: ^Z stops a program, fg lets it go on"
else
  not_ok "job control: ^Z stops a program, fg lets it go on" "running, Stopped, got the line, logout" "$said"
fi
unlike "job control: bash is content with its terminal" "$said" "terminal process group"
hang_up

# -- what one cannot do ---------------------------------------------------------------------------

like "lab cannot read the host keys" "$(lab cat /var/lib/gosshd/hostkeys/ssh_host_ed25519_key)" "Permission denied"
like "lab cannot list the host keys" "$(lab ls /var/lib/gosshd/hostkeys)" "Permission denied"
like "lab cannot kill process 1" "$(lab 'kill -9 1')" "not permitted"
like "lab cannot kill the server" "$(lab "kill -9 $server")" "not permitted"
is "lab has no capabilities and gets none" "$(lab "awk '/^(CapPrm|CapEff|CapAmb|NoNewPrivs)/ {print \$2}' /proc/self/status" | tr '\n' ' ')" \
  "0000000000000000 0000000000000000 0000000000000000 1 "
# CHOWN 1, KILL 20, SETGID 40, SETUID 80 (capability.h): what docker-compose.yml names.
is "the server has four capabilities" "$(inside awk '/^Cap(Eff|Bnd)/ {print $2}' "/proc/$server/status" | tr '\n' ' ')" \
  "00000000000000e1 00000000000000e1 "
like "the root file system is read-only, even for root" "$(inside touch /usr/local/x)" "Read-only file system"
is "/tmp, /var/tmp and /home/lab are writable" "$(lab 'touch /tmp/x /var/tmp/x ~/x && echo yes')" yes
is "memory is limited, swap included" "$(inspect '{{.HostConfig.Memory}} {{.HostConfig.MemorySwap}}')" "536870912 536870912"

# A program that ignores the hang-up is killed all the same; that takes CAP_KILL.
gone() { [[ $(inside ls -d "/proc/$pid") == *"No such file"* ]]; }
open 'trap "" HUP; echo pid $$.; exec sleep 300'
expect pid || not_ok "a session starts" pid "$said"
pid=${said##*pid } pid=${pid%%.*}
hang_up
if eventually 20 gone; then ok "what a lost client ran is killed"; else
  not_ok "what a lost client ran is killed" "no process $pid" "$(inside ps -u lab)"; fi

# Forks until that fails (at most 1000 times), holds the processes for a line of input, ends them.
cat >"$work/forks.py" <<'PY'
import os, signal, sys
children = []
try:
    for _ in range(1000):
        children.append(os.fork() or signal.pause())
except OSError:
    pass
print("forks:", len(children), flush=True)
sys.stdin.readline()
for pid in children:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
print("ended:", len(children), flush=True)
PY
limit=$(inspect '{{or .HostConfig.PidsLimit 0}}')
within 30 "${SSH[@]}" 'cat >forks.py' <"$work/forks.py" || true
open 'exec python3 forks.py'
expect forks: || true
forks=${said##*forks: } forks=${forks%%[!0-9]*}
if ((${forks:-0} > 9 && ${forks:-0} < limit)); then ok "no more than $limit processes ($forks forks)"; else
  not_ok "no more than $limit processes" "some forks" "$said"; fi
like "with all processes taken, the server still answers" "$(identification)" SSH-2.0-
say '\n'
expect ended: || not_ok "the forks end" "ended: $forks" "$said"
hang_up
is "afterwards it serves as before" "$(lab echo alive)" alive
like "too much memory ends the program that takes it" "$(lab "python3 -c 'b\"x\" * (600 << 20)'; echo exit \$?")" "exit 137"
is "and the server has lived through all this" "$(inside pgrep -o -x gosshd) $(inspect '{{.RestartCount}}')" "$server 0"

# -- stop, take away, start again -----------------------------------------------------------------

lab 'echo still here >kept'
open 'trap "" HUP; echo ready; exec sleep 300'
expect ready || not_ok "a session starts" ready "$said"
began=$SECONDS
within 60 docker stop "$container" >/dev/null
took=$((SECONDS - began))
if ((took < 10)); then ok "docker stop takes less than 10 s, with a session open ($took s)"; else
  not_ok "docker stop takes less than 10 s" "< 10" "$took"; fi
is "the exit code is 0" "$(inspect '{{.State.ExitCode}}')" 0
hang_up

key=$(<"$work/known_hosts")
compose down >"$work/down" 2>&1 || die "down failed: $(cat "$work/down")"
start "down and up: healthy again"
is "the host key is the same" "$(<"$work/known_hosts")" "$key"
is "a file in /home/lab is still there" "$(lab cat kept)" "still here"

echo "$passed passed, $failed failed"
exit $((failed > 0))
