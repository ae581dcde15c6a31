"""Compiles CUDA kernels by NVRTC for several architectures, and tabulates registers, shared memory and spills."""
import argparse, concurrent.futures, ctypes, glob, os, re, sys, threading
import nvidia.cu13 as package

LIB = ctypes.CDLL(glob.glob(os.path.join(list(package.__path__)[0], "lib", "libnvrtc.so.*"))[0])
VARIANTS = {"attention": [[f"-DHEAD_SIZE={k}"] for k in (32, 64, 128)]}
LOCK = threading.Lock()

def compile(path, arch, defines):
    headers = sorted(glob.glob("kernels/cuda/*.cuh"))
    array = lambda texts: (ctypes.c_char_p * len(texts))(*texts)
    program = ctypes.c_void_p()
    LIB.nvrtcCreateProgram(
        ctypes.byref(program), open(path, "rb").read(), path.encode(), len(headers),
        array([open(h, "rb").read() for h in headers]), array([os.path.basename(h).encode() for h in headers]))
    options = [f"--gpu-architecture=sm_{arch}", "--std=c++17", "-default-device", "--ptxas-options=-v", *defines]
    status = LIB.nvrtcCompileProgram(program, len(options), array([o.encode() for o in options]))
    size = ctypes.c_size_t()
    LIB.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    LIB.nvrtcGetProgramLog(program, log)
    return status, log.value.decode()

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", action="append")
    parser.add_argument("-D", action="append", dest="defines")
    parser.add_argument("--element", action="append")
    parser.add_argument("files", nargs="*")
    args = parser.parse_args()
    files = args.files or sorted(glob.glob("kernels/cuda/*.cu"))
    jobs = []
    for path in files:
        stem = os.path.basename(path)[:-3]
        base = stem.split("_")[0]
        variants = [["-D" + d for d in args.defines]] if args.defines else VARIANTS.get(stem, VARIANTS.get(base, [[]]))
        for element in args.element or ("F32", "BF16", "F16"):
            for variant in variants:
                for arch in args.arch or ("80", "90a", "100"):
                    jobs.append((path, arch, [f"-DELEMENT_{element}", *variant]))
    failed = False
    print(f"{'kernel':36} {'defines':34} {'arch':5} {'regs':>4} {'smem':>6} {'stack':>5} {'spill st':>8} {'ld':>5}")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for (path, arch, defines), (status, log) in zip(jobs, pool.map(lambda job: compile(*job), jobs)):
            label = " ".join(d[2:] for d in defines)
            if status:
                failed = True
                print(f"FAILED {path} {label} sm_{arch}\n{log}")
                continue
            for line in log.splitlines():
                if not line.startswith("ptxas") and line.strip():
                    print(f"  {line}")
            hot = set(re.findall(r"// hot\s*\nKERNEL.*?(\w+)\(", open(path).read()))
            for block in log.split("Compiling entry function ")[1:]:
                name = block.split("'")[1]
                number = lambda pattern: int((re.search(pattern, block) or [0, 0])[1])
                stores, loads = number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes spill loads")
                note = "  SPILLS" if stores + loads else ""
                failed |= bool(stores + loads) and name in hot
                registers, shared = number(r"Used (\d+) registers"), number(r"(\d+) bytes smem")
                stack = number(r"(\d+) bytes stack frame")
                print(f"{name:36} {label:34} {arch:5} {registers:4} {shared:6} {stack:5} {stores:8} {loads:5}{note}")
    sys.exit(1 if failed else 0)

main()
