# Two commands: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo

.PHONY: demo test test-hostile test-demo-base chaos chaos-short test-stores test-slurm test-slurm-short image sbom test-image lint types docs lock templates clean

# The CPU lock pins every package. Where pip finds a CPU build of torch (an extra index in PIP_EXTRA_INDEX_URL, or a
# wheel in PIP_FIND_LINKS) it is taken; otherwise the CUDA build comes, which runs on the CPU as well.
$(VENV)/installed: locks/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement locks/cpu.txt
	@touch $@

demo: $(VENV)/installed
	@JOB_LOG_FORMAT=$${JOB_LOG_FORMAT:-console} $(BIN)/python entrypoint.py run recipes/demo.yaml \
		--output file://$(CURDIR)/$(DEMO)/store --workdir $(DEMO)/work --device cpu --outcome-file $(DEMO)/outcome.json

# Three at once: on two cores one mostly waits for a process, a lease or a server.
PYTEST_BY_FILES = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 3 --dist loadfile \
	--no-loadscope-reorder
# What starts whole runs, in a process or several, or makes whole pages: most of the time of all tests.
WHOLE_RUNS = tests/run tests/launch tests/k8s tests/slurm tests/hostile tests/bench tests/render/test_page.py \
	tests/render/test_nights_pages.py tests/tune/loop/test_ranks.py tests/tune/loop/test_sharded_ranks.py \
	tests/tune/loop/test_mixtures_of_ranks.py
test: $(VENV)/installed
	$(PYTEST_BY_FILES) --ignore tests/chaos $(addprefix --ignore ,$(WHOLE_RUNS))

.PHONY: test-runs
test-runs: $(VENV)/installed
	$(PYTEST_BY_FILES) $(WHOLE_RUNS)

# Every attack by what is read from outside, each in a process that may take little memory; `make test-runs` has those
# that take seconds.
test-hostile: $(VENV)/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "hostile or not hostile" tests/hostile

# Every family of decoders, tiny, beside plain PEFT and `generate`, and merged; `make test` has one of each kind.
.PHONY: test-families
test-families: $(VENV)/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 -m "families or not families" \
		tests/tune/engines tests/tune/loop/answers/test_greedy.py tests/tune/merging \
		tests/tune/model/test_targets_of_mixtures.py tests/tune/test_rehearsal.py

# Several processes together: sharded, judged, asked to stop, killed, nights, pods; `make test-runs` has one of each kind.
.PHONY: test-ranks
test-ranks: $(VENV)/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 3 -m "ranks or not ranks" \
		tests/launch tests/k8s/test_two_pods.py tests/tune/loop

# What measures, on the CPU and small: each of bench/ from its start to its table.
.PHONY: test-bench
test-bench: $(VENV)/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 -m "bench or not bench" tests/bench

# The report's page as a browser shows it: a desk, a phone, the dark, paper, and what axe-core says. The screenshots stay in
# .page/. tests/page/install.sh brings the browser (root, Debian or Ubuntu); without one the tests are skipped.
.PHONY: test-page
test-page: $(VENV)/installed
	tests/page/install.sh
	$(BIN)/python -m pytest -m "page or not page" tests/page tests/render/test_page.py

# docs/demo-report.json, its page and its picture, as `make demo` and the browser of `make test-page` make them.
.PHONY: demo-page
demo-page: demo
	PYTHONPATH=. $(BIN)/python tests/page/demo_page.py docs $(DEMO)/store

# MLflow against its own server and W&B by its own client, in a virtual environment of their own beside ours (.trackers).
.PHONY: test-trackers
test-trackers: $(VENV)/installed
	tests/trackers/install.sh
	.trackers/bin/python -m pytest -m trackers tests/trackers

# A real model, tuned, merged, and asked in CTranslate2, which is installed beside ours (.second-engine), and its adapter in
# plain PEFT: SMOLLM2_FOLDER=FOLDER has SmolLM2-135M-Instruct.
.PHONY: test-second-engine
test-second-engine: $(VENV)/installed
	tests/run/install_second_engine.sh
	SMOLLM2_FOLDER="$(SMOLLM2_FOLDER)" .second-engine/bin/python -m pytest -rs tests/run/test_second_engine.py

# Seven nights of a channel on an S3 server, its crash points, double starts and rollbacks: under ten minutes on two free
# cores. The seven nights alone with other data (a JSONL file of 1,000 records or more, of which held-out ones are split
# off) and another base, as `--device` names it:
#   make test-nightly DATA=gsm8k/train.jsonl BASE=models/Qwen3-0.6B-Base DEVICE=cuda
# PROMPT= and COMPLETION= give the templates where the fields are not called question and answer, or as other known pairs.
.PHONY: test-nightly
NIGHTLY = NIGHTLY_DATA='$(DATA)' NIGHTLY_BASE='$(BASE)' NIGHTLY_PROMPT='$(PROMPT)' NIGHTLY_COMPLETION='$(COMPLETION)' \
	NIGHTLY_DEVICE='$(DEVICE)'
test-nightly: $(VENV)/installed
	$(NIGHTLY) PYTHONPATH=. $(BIN)/python tests/run/seven_nights.py
	$(NIGHTLY) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $(if $(DATA)$(BASE),,-n 2 --dist load) \
		-m "nightly or not nightly" $(if $(DATA)$(BASE),,tests/run/test_nights.py) tests/run/test_seven_nights.py

# Builds the demo's base anew: the one in recipes/demo-base to the bit on the kind of machine that it names, elsewhere one
# that has learned as much. `python recipes/demo_base.py recipes/demo-base` builds it there, after a change of the script.
test-demo-base: $(VENV)/installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "demo_base or not demo_base" tests/recipes

# Attempts killed, stopped, frozen, started twice, alone and as one of several processes, on a store that dies, lies and
# forbids, on disks that fill: two hours on two cores. What was done goes into bench/RESULTS.md. CHAOS_SEED=... draws
# other moments; CHAOS_ENGINE=fast trains by the engine's step.
chaos: $(VENV)/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE CHAOS_RESULTS=bench/RESULTS.md \
		$(BIN)/python -m pytest -s -m "chaos or not chaos" tests/chaos

# One or two of each kind, in minutes.
chaos-short: $(VENV)/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/chaos

# Against a real Ceph RGW and a real Swift, which tests/stores/ installs and starts here (root, Debian or Ubuntu) and
# takes down again.
test-stores: $(VENV)/installed
	tests/stores/install.sh
	$(BIN)/python -m pytest -m stores tests/stores

# On a real Slurm of two nodes, which tests/slurm/ installs and starts here (root, Debian or Ubuntu) and takes down again.
# The short one takes four minutes: a job to its end, its time limit, a more important job, a cancellation, wrong data.
test-slurm: SLURM_TESTS := slurm or not slurm
test-slurm-short: SLURM_TESTS := slurm_short
test-slurm test-slurm-short: $(VENV)/installed
	tests/slurm/install.sh
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "$(SLURM_TESTS)" tests/slurm

# The image and its bill of materials; docs/image.md has the variables (make IMAGE=... hands them on).
image:
	@image/build.sh

sbom: $(VENV)/installed
	@image/sbom.sh

# Builds the image from the CPU lock and runs it, with docker, or with podman and buildah, which tests/image/ installs
# (root, Debian or Ubuntu). Without BASE_IMAGE it makes a Debian to build on.
test-image: $(VENV)/installed
	tests/image/install.sh
	$(BIN)/python -m pytest -m image tests/image

# The image as it ships, from the lock for CUDA with its hashes: 4 GB are downloaded, and 30 GB of disk below /var/tmp
# (or TMPDIR) are needed until it has ended. No GPU. Without BASE_IMAGE it makes a Debian 13 to build on.
.PHONY: test-image-cuda
test-image-cuda: $(VENV)/installed
	tests/image/install.sh
	$(BIN)/python -m pytest -s -m image_cuda tests/image

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck slurm/*.sh slurm/*.sbatch image/*.sh tests/*/*.sh .ci/run

types: $(VENV)/installed
	$(BIN)/mypy

# The recipe reference, the JSON Schemas and the README's table, from the code.
docs: $(VENV)/installed
	$(BIN)/python docs/generate.py
	$(BIN)/python tests/tune/models_page.py

# The overlays of k8s/ as kubectl renders them, so that they are tested where kubectl is not.
templates: $(VENV)/installed
	$(BIN)/python tests/k8s/k8s_manifests.py

# Both locks from pyproject.toml. The CPU one is for tests and the demo, without the CUDA packages and without hashes
# (which build of torch comes depends on where it is looked for); the CUDA one is for the image, with hashes: for the
# Python 3.12 of its own base, and as it stands for 3.13 as well.
LOCK_FOR_CUDA = $(BIN)/uv pip compile pyproject.toml --extra gpu --extra tensorboard --extra wandb --extra mlflow \
	--generate-hashes --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --quiet
lock: $(VENV)/installed
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --no-header --no-annotate --quiet \
		| grep -vE '^(nvidia-(cu|nc|nv)|cuda|triton)' > locks/cpu.txt
	$(LOCK_FOR_CUDA) --python-version 3.12 --output-file locks/cuda.txt
	cp locks/cuda.txt $(VENV)/cuda-3.13.txt
	$(LOCK_FOR_CUDA) --python-version 3.13 --output-file $(VENV)/cuda-3.13.txt
	cmp locks/cuda.txt $(VENV)/cuda-3.13.txt

# The lock for CUDA 12.6 (make locks/cu126.txt; docs/image.md): the same software, but for PyTorch's own build of torch.
locks/cu1%.txt: pyproject.toml locks/cuda.txt $(VENV)/installed
	grep -oE '^[a-z0-9._-]+==[^ ]+' locks/cuda.txt | grep -vE '^(torch|triton|cuda|nvidia-(cu|nc|nv))' > $(VENV)/pins.txt
	$(LOCK_FOR_CUDA) --constraints $(VENV)/pins.txt --torch-backend cu1$* --python-version 3.12 --output-file $@

clean:
	rm -rf $(VENV) $(DEMO) .page .second-engine .trackers work
