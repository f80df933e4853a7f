"""The process and the machine around it: signals, logs, the outcome file, the watchdog, the GPU's health."""
