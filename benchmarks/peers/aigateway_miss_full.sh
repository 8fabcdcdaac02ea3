# the same as aigateway_miss over 100,000 keys, 2,000,000 records and 50,000 cached answers: run with --unique, beside `aigateway_miss`
# Needs the project's .venv (scripts/test and the others make it; it has uvloop and httptools).
PORT=9207 URLPATH=/ai/v1/chat/completions READY=/ai/readyz
AIGATEWAY_PYTHON="$PROJECT/.venv/bin/python"
[ -s "$WORK/aigateway.key" ] || "$AIGATEWAY_PYTHON" "$PROJECT/benchmarks/app.py" >"$WORK/aigateway.key"
# It is filled once, which takes some ten minutes, and used by every run after it.
AIGATEWAY_FULL="$WORK/aigateway-full"
[ -d "$AIGATEWAY_FULL" ] || PYTHONPATH="$PROJECT" "$AIGATEWAY_PYTHON" "$PROJECT/benchmarks/scale.py" "$AIGATEWAY_FULL" >&2
HEADERS="Authorization: Bearer $(cat "$WORK/aigateway.key")"
CMD="DATA_DIR=$AIGATEWAY_FULL exec $AIGATEWAY_PYTHON -m uvicorn --app-dir $PROJECT/benchmarks app:app --port 9207 --loop uvloop --http httptools --no-access-log --log-level warning"
