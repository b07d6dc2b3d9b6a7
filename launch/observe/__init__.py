"""What people see of runs: `dpdist status` and `dpdist logs`. Imports neither JAX nor NumPy: a login node is slow."""
