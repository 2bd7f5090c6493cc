# The server as root, which it needs to start shells as somebody else; the shells as `lab`.
# docker-compose.yml has the limits that belong to it.

FROM python:3.13-slim AS build
# A virtual environment without pip: what is copied below holds the server and nothing to build it.
RUN python3 -m venv --without-pip /opt/gosshd
COPY pyproject.toml README.md LICENSE /src/
COPY gosshd_py /src/gosshd_py
RUN pip --python /opt/gosshd/bin/python install --no-cache-dir /src

FROM python:3.13-slim
# What people expect to find in a shell; setpriv comes with the base image.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      git less openssh-sftp-server procps rsync tini tmux vim-tiny \
 && apt-get clean && rm -rf /var/lib/apt/lists/*
# The host keys are made at the first start, never here: an image is copied, a key must not be.
# New volumes take owner and mode from these directories.
RUN useradd --create-home --uid 1000 --shell /bin/bash lab \
 && install -d -m 0700 /var/lib/gosshd /var/lib/gosshd/hostkeys
COPY --from=build /opt/gosshd /opt/gosshd
RUN ln -s /opt/gosshd/bin/gosshd /usr/local/bin/gosshd

# In the environment, not in CMD, so that `docker exec … gosshd known-hosts` sees the same settings.
# Being open to the network means the container's network; what gets out is what you publish.
ENV LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    GOSSHD_LISTEN=0.0.0.0:2222 \
    GOSSHD_OPEN_TO_NETWORK=true \
    GOSSHD_RUN_AS=lab \
    GOSSHD_HOME=/home/lab \
    GOSSHD_HOSTKEYS=/var/lib/gosshd/hostkeys
WORKDIR /
EXPOSE 2222
HEALTHCHECK --interval=10s --timeout=8s --start-period=20s --retries=3 \
    CMD ["gosshd", "probe", "127.0.0.1:2222"]
# tini reaps what the shells leave behind, and hands SIGTERM to the server.
ENTRYPOINT ["tini", "--", "gosshd"]
