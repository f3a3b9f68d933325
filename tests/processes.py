"Programs of this project as real processes that start in no time: a server imports torch and histogan once, and forks."
import importlib, multiprocessing, os, sys, time
from multiprocessing import forkserver
from pathlib import Path

from conftest import ROOT, free_port

ENV = {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', 'NO_COLOR': '1'}

def server():
    "A clean process to fork from: this one may have threads."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['histogan.train', 'histogan.generate', 'matplotlib.pyplot', 'torch._dynamo'])  # the last: the first Adam of a process imports it
    kept = {k: os.environ.get(k) for k in ENV}
    os.environ.update(ENV)
    try: forkserver.ensure_running()
    finally:
        for k, v in kept.items():
            if v is None: del os.environ[k]
            else: os.environ[k] = v
    return context

def work(module, argv, log, env, before):
    "The life of a program: its output goes to a file, its exit code is the process's."
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(ENV | env)
    code = 1
    try:
        if before: before()
        sys.argv = [module, *argv]
        code = importlib.import_module(module).main()  # as a command, whose second Ctrl-C ends it
    except KeyboardInterrupt: code = 130
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 1: __import__('traceback').print_exc()
        os._exit(code)

class Program:
    "`python -m histogan.train …` under way."
    def __init__(self, argv, log, module='histogan.train', env={}, before=None):
        self.log = Path(log)
        self.log.write_text('')
        self.process = server().Process(target=work, args=(module, list(map(str, argv)), str(log), env, before))
        self.process.start()

    def wait(self, timeout=600):
        "Its exit code; -9 when it was killed."
        self.process.join(timeout)
        assert self.process.exitcode is not None, f'still running: {self.said}'
        return self.process.exitcode

    def signal(self, number): os.kill(self.process.pid, number)
    @property
    def said(self): return self.log.read_text()
    @property
    def running(self): return self.process.exitcode is None

def until(condition, program=None, timeout=300, every=0.002):
    "Wait for a condition, or the end of a program; the condition's last value."
    deadline = time.monotonic() + timeout
    while not (value := condition()) and time.monotonic() < deadline and (program is None or program.running): time.sleep(every)
    return value

def together(n, argv, log, **kw):
    "The same program in n processes that see each other as under torchrun."
    env = dict(WORLD_SIZE=n, MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    return [Program(argv, f'{log}.{k}', env={a: str(b) for a, b in (env | dict(RANK=k, LOCAL_RANK=k)).items()}, **kw) for k in range(n)]
