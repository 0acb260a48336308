# Two stages: the first installs, the second has what is installed and nothing that built it.
#
#   docker build -t muset .
#   docker run --read-only --tmpfs /tmp -p 8000:8000 -v muset:/var/lib/muset muset
#
# PREFIX comes before every path of the image and is empty there. With another one the same steps
# run in any folder, without root, which is how they are tested where there is no Docker.

FROM python:3.11.11-slim-bookworm AS build
ARG PREFIX=
WORKDIR ${PREFIX}/src
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY extensions ./extensions
COPY muset ./muset
RUN python3 -m venv ${PREFIX}/opt/muset
RUN ${PREFIX}/opt/muset/bin/pip install --no-cache-dir --disable-pip-version-check --quiet \
    --constraint constraints.txt ./extensions .
RUN mkdir -p ${PREFIX}/empty

FROM python:3.11.11-slim-bookworm
ARG PREFIX=
COPY --from=build ${PREFIX}/opt/muset ${PREFIX}/opt/muset
# A new volume takes its owner from here.
COPY --from=build --chown=10001:10001 ${PREFIX}/empty ${PREFIX}/var/lib/muset
WORKDIR ${PREFIX}/var/lib/muset
ENV PATH=${PREFIX}/opt/muset/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    MUSET_DATA_DIR=${PREFIX}/var/lib/muset \
    MUSET_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8000 9090
VOLUME ${PREFIX}/var/lib/muset
# The time for a stop is gunicorn's graceful_timeout of 30 s: let the container have 40.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('PORT', '8000') + '/health/live', timeout=2)"]
CMD ["muset", "serve"]
