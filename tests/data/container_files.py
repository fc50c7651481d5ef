"""Write arrays as they are indexed, in any format of containers."""

import h5py
import numpy as np
import scipy.io


def write(path, **arrays):
    """Write arrays as they are indexed in the format that the suffix names."""
    if path.suffix == ".npy":
        np.save(path, arrays["cube"])
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.name.endswith("_v73.mat"):
        with h5py.File(path, "w", userblock_size=512) as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=np.atleast_2d(array).T).attrs["MATLAB_class"] = np.bytes_("double")
        with path.open("r+b") as stream:
            stream.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    elif path.suffix == ".mat":
        scipy.io.savemat(path, arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
