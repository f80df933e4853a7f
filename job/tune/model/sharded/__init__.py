"""A base that is spread over several GPUs: put into 4 bits before it is loaded, and gathered layer by layer."""
