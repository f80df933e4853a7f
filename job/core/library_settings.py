"""What libraries read from the environment as they are loaded, where their own defaults harm."""

LIBRARY_SETTINGS = {
    # Threads that wait by spinning make training eight times slower as soon as anything else wants a core, and eat a
    # container's CPU quota.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Arrow's own allocator takes a gigabyte of address space before it holds a byte, and sites limit that (ulimit -v).
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    # A tracker hears from its own server's client alone; what these libraries send to their makers nobody asked for.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    # Standard output is events, or what a person asked for.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
