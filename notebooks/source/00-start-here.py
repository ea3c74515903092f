# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Start here
#
# Welcome. This is a course about **virtualization**: making one computer behave like several. You will not
# read about it; you will do it, on real virtual machines, on the computer in front of you. It needs no
# special hardware.

# %% [markdown]
# ## What you will be able to do
#
# - run the cells of a notebook;
# - say what your computer can do for this course, and how to mend what it cannot;
# - start a virtual machine, and know that it is gone again.

# %% [markdown]
# ## Before you start
#
# **You need to know** nothing yet. **Time:** 10 minutes.
#
# A notebook is a page of texts and **cells**. The box below this text is a cell, with a line of Python in it.
# Click into it and press
# <kbd>Shift</kbd>+<kbd>Enter</kbd>: the line is run, and its answer appears under it.

# %%
6 * 7

# %% [markdown]
# The answer was there already? It came from the computer on which this page was made. When you run a cell,
# your own takes its place. While a cell is at work, it has a star `[*]` beside it; a number means that it is
# done.
#
# Did that work? Then the next cell will, too. It loads the course's library, `labkit`, and looks at whether
# it can run machines here. It should say `True`.

# %%
import labkit

report = labkit.doctor()
report.tier in ("kvm", "tcg")

# %% [markdown]
# ## What your computer can do
#
# The doctor has looked at everything that matters. Read the first line, and then look for the word **fail**:
# hopefully there is none. Lines marked **info** are for the curious, and those with an arrow say how to get
# more, if you like.

# %% tags=["nbval-ignore-output"]
report

# %% [markdown]
# The first line names your **tier**:
#
# - **kvm**: your processor can run guests itself. Machines are nearly as fast as the computer.
# - **tcg**: QEMU translates the guests' code. Machines are slower, and everything in this course works. Cloud
#   shells, containers and most virtual machines are in this tier, so you are in good company.
# - **none**: no machine can run yet. The doctor's lines with *fail* say what to do; then run the cell again.
#
# (Perhaps you have read that virtualization *requires* a processor with the flags `vmx` or `svm`. They make
# it fast, and it can do without them: your machines run either way. Notebook 04 looks at those flags bit by
# bit.)

# %% [markdown]
# ## A virtual machine in one cell
#
# **Predict.** The next cell makes a complete computer, starts Linux on it, asks it who it is, and throws it
# away. How long will that take: a second, ten seconds, a minute? Write down your number of seconds.

# %%
my_seconds = None

# %% tags=["nbval-ignore-output"]
import time

begun = time.perf_counter()

with labkit.Lab("hello") as lab:
    web = lab.vm("web").start()
    answer = web.run("uname -a").stdout

print(answer)
print(f"{time.perf_counter() - begun:.1f} s from nothing to an answer, and back (you said: {my_seconds})")

# %% [markdown]
# **Explain.** `uname -a` was answered by a Linux kernel that had not been running before, on a machine that
# did not exist before, and that is gone now: leaving the `with` block clears the lab away. See for yourself
# that it took its name with it:

# %%
print("the machine's own name:", answer.split()[1])
print("what is left of the lab:", lab)

# %% [markdown]
# ## How this course works
#
# - **Predict, run, explain.** Before a cell shows you something, commit yourself to a guess. Being wrong is
#   the quickest way to learn; nobody sees it but you.
# - **Every figure comes from your computer.** Texts say how things relate ("faster than", "half of"); the
#   numbers are yours.
# - **You cannot break anything.** labkit touches only what it made itself. Machines that you forget go by
#   themselves when the notebook's kernel is shut down. To clear everything away at once, type
#   `.venv/bin/labkit clean` in a terminal.
# - **Run cells again as often as you like.** If things are in a muddle: *Kernel → Restart Kernel…*, and begin
#   at the top.
# - **Folded parts** go deeper. Skip them the first time. For instance this one:
#
# <details>
# <summary><b>Deeper:</b> what happened in that one cell?</summary>
#
# labkit wrote a description of a machine, and asked libvirt to start it. libvirt started QEMU, a program that
# plays the hardware of a computer. QEMU put a Linux kernel, and a small file system made of packages of your
# own distribution, into the machine's memory and let it run. A program in the guest said hello over a virtual
# serial port, and labkit sent the command the same way. Notebook 03 takes it apart, step by step.
#
# </details>
#
# The course follows a text, *Virtualization Basics*, and goes through all of it. These notebooks are here so
# far:
#
# | Notebook | What really happens in it |
# | :--- | :--- |
# | **00** Start here | this one |
# | **[03](03-your-first-vm.ipynb)** Your first virtual machine | made, started, seen from inside and outside, broken, brought back, cloned, removed |
#
# Still being written: what virtualization is (01), hypervisors (02), full virtualization (04),
# paravirtualization (05), containers (06), server consolidation (07), development and testing (08), disaster
# recovery (09), benefits and limits (10), monitoring (11), networks (12), host against VM (13), containers
# against VMs (14), and where to go next (15).

# %% [markdown]
# ## Check yourself
#
# Decide first, then open the answer.

# %% [markdown]
# **1.** Your tier is *tcg*. What can you not do in this course?
#
# - (a) Start virtual machines.
# - (b) Take snapshots.
# - (c) Nothing of it, but it takes longer.
#
# <details><summary>Answer to 1</summary>
#
# **(c)** Everything works, only slower. TCG translates the guest's instructions, so it needs nothing of the
# processor.
#
# </details>

# %% [markdown]
# **2.** You close the browser with a virtual machine still running. What becomes of it?
#
# - (a) It runs for ever.
# - (b) It goes when the notebook's kernel has been shut down for a while.
# - (c) It is gone at once.
#
# <details><summary>Answer to 2</summary>
#
# **(b)** The notebook's kernel goes on when only the browser is closed, and so does the machine: come back
# and go on. When the kernel has been shut down, labkit clears its machines away about a minute later.
#
# </details>

# %% [markdown]
# ## Summary
#
# - A cell is run with <kbd>Shift</kbd>+<kbd>Enter</kbd>.
# - `labkit.doctor()` says what this computer can do, and how to mend what it cannot.
# - `with labkit.Lab(…) as lab` gives you a bench; `lab.vm(…).start()` puts a running machine on it; at the
#   end it is cleared away.

# %% [markdown]
# ## Exercises
#
# 1. In the cell with `uname -a`, change the command to `cat /proc/meminfo`, and run it. How much memory does
#    the machine have?
# 2. Change `lab.vm("web")` to `lab.vm("web", memory="512 MiB")`. What changes?
# 3. Ask the machine for something that does not exist: `web.run("no-such-command")`. Read the last lines of
#    what you get.

# %% [markdown]
# ## Where to go on
#
# **[Your first virtual machine](03-your-first-vm.ipynb)** takes the time to look at everything that went by
# so quickly here.
