# The probe guest for x86-64: a firmware image that does, in a few milliseconds, what any 64-bit
# kernel does while it boots, and says on QEMU's debug console how far it came.
#
#     R  real mode        the reset vector, 16-bit code
#     P  protected mode   a GDT, 32-bit code
#     L  long mode        page tables, EFER.LME, 64-bit code
#     F  page fault       an unmapped page is touched; our handler maps it; the access is repeated
#     T  timer            three interrupts of the local APIC's timer, each awaited by HLT
#     K  kernel work      5 million turns of a loop in ring 0
#     U  user work        1 million turns in ring 3, entered by SYSRET and left by SYSCALL
#     16 hex digits       what both loops computed; labkit.hypervisors.probe knows the answer
#
# Then it writes 0x10 to isa-debug-exit, so that QEMU exits with (0x10 << 1) | 1 = 33.
#
# Why a loop in ring 0: a KVM without hardware beneath it (PVM) runs ring 3 natively and interprets
# ring 0 instruction by instruction. Everything above K takes no time there either; a kernel's boot,
# a thousand times slower than it should be, never ends. 25 million instructions in ring 0 are over in
# 10 ms under a KVM that works, in 30 ms under TCG, and take 15 s where they are interpreted.
#
# Registers, paging structures and descriptors are as in the Intel SDM, volume 3, chapters 3 to 5 and
# 11 (APIC), and AMD's APM, volume 2, chapters 4 to 6.
#
# Assembled by `python -m labkit.hypervisors.probe`, which writes x86_64.hex: nobody who uses labkit
# needs an assembler. The image is 64 KiB; QEMU maps it below 4 GiB and again at 0xf0000.
#
# Memory: 0x1000 PML4, 0x2000 PDPT, 0x3000 0x4000 0x6000 page directories, 0x5000 page table,
#         0x8000 IDT, below 0x80000 the stack, 0x100000 the page that the page fault maps.

        .intel_syntax noprefix

        .equ    BASE, 0xf0000           # where the image is seen below 1 MiB
        .equ    DEBUGCON, 0xe9
        .equ    EXIT, 0xf4
        .equ    PML4, 0x1000
        .equ    PDPT, 0x2000
        .equ    PD_LOW, 0x3000          # maps the first 2 MiB onto themselves
        .equ    PD_FAULT, 0x4000        # maps 1 GiB .. 2 GiB: empty until the page fault
        .equ    PT_FAULT, 0x5000
        .equ    PD_APIC, 0x6000         # maps the local APIC's page onto itself
        .equ    IDT, 0x8000
        .equ    STACK, 0x80000
        .equ    PAGE, 0x100000          # a page of RAM …
        .equ    ALIAS, 0x40000000       # … and the address where it is not mapped yet
        .equ    APIC, 0xfee00000
        .equ    TABLE, 0x07             # present, writable, for user mode too
        .equ    LARGE, 0x87             # the same, and a page of 2 MiB
        .equ    UNCACHED, 0x93          # present, writable, no cache, a page of 2 MiB

        .macro  say letter
        mov     al, \letter
        out     DEBUGCON, al
        .endm

        .macro  gate vector, handler    # IDT[vector] = handler
        lea     rax, [rip + \handler]
        mov     edi, IDT + 16 * \vector
        call    set_gate
        .endm

        .macro  turn label              # one turn of the computation on rax, counted down in ecx
        imul    rax, rbx
        rol     rax, 23
        xor     rax, rcx
        dec     ecx
        jnz     \label
        .endm

# ---------------------------------------------------------------- real mode
        .code16
start:
        cli
        say     'R'
        lgdt    cs:[gdtr - start]
        mov     eax, cr0
        or      al, 1                   # CR0.PE
        mov     cr0, eax
        .byte   0x66, 0xea              # a far jump with a 32-bit offset to …
        .long   BASE + protected - start
        .word   0x08                    # … the 32-bit code segment

# ---------------------------------------------------------------- protected mode
        .code32
protected:
        mov     eax, 0x10
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        say     'P'
        xor     eax, eax                # empty page tables and IDT
        mov     edi, PML4
        mov     ecx, (IDT + 0x1000 - PML4) / 4
        cld
        rep stosd
        mov     dword ptr [PML4], PDPT + TABLE
        mov     dword ptr [PDPT + 8 * 0], PD_LOW + TABLE
        mov     dword ptr [PDPT + 8 * 1], PD_FAULT + TABLE
        mov     dword ptr [PDPT + 8 * 3], PD_APIC + TABLE
        mov     dword ptr [PD_LOW], LARGE
        mov     dword ptr [PD_APIC + 8 * ((APIC >> 21) & 511)], APIC + UNCACHED
        mov     eax, PML4
        mov     cr3, eax
        mov     eax, 0x620              # CR4.PAE, and SSE: OSFXSR, OSXMMEXCPT
        mov     cr4, eax
        mov     ecx, 0xc0000080         # EFER: LME (long mode) and SCE (SYSCALL)
        mov     eax, 0x101
        xor     edx, edx
        wrmsr
        mov     eax, 0x80010013         # CR0: PG, WP, ET, MP, PE
        mov     cr0, eax
        jmp     0x18, BASE + long - start

# ---------------------------------------------------------------- long mode
        .code64
long:
        mov     esp, STACK
        say     'L'
        gate    14, page_fault
        gate    32, tick
        lidt    [rip + idtr]

        mov     ebx, ALIAS
        mov     dword ptr [rbx + 0x100], 0x1234
        cmp     dword ptr [PAGE + 0x100], 0x1234
        jne     fail
        say     'F'

        mov     ebp, APIC
        mov     dword ptr [rbp + 0xf0], 0x1ff           # spurious vector; enabled
        mov     dword ptr [rbp + 0x3e0], 0x0b           # timer: divide by 1
        mov     dword ptr [rbp + 0x320], 0x20020        # periodic, vector 32
        mov     dword ptr [rbp + 0x380], 1000000        # 1 ms at QEMU's and KVM's 1 GHz
        xor     r15d, r15d
wait_for_ticks:
        sti
        hlt
        cli
        cmp     r15d, 3
        jb      wait_for_ticks
        mov     dword ptr [rbp + 0x320], 0x10020        # masked
        say     'T'

        mov     ecx, 5000000
        movabs  rbx, 0x9e3779b97f4a7c15
        mov     eax, 1
kernel_work:
        turn    kernel_work
        mov     r14, rax
        say     'K'

        mov     ecx, 0xc0000081         # STAR: SYSRET to 0x33/0x2b, SYSCALL to 0x18/0x20
        xor     eax, eax
        mov     edx, 0x00230018
        wrmsr
        mov     ecx, 0xc0000082         # LSTAR: where SYSCALL goes
        lea     rax, [rip + system_call]
        xor     edx, edx
        wrmsr
        lea     rcx, [rip + user]
        mov     r11d, 2                 # flags in user mode: interrupts off
        sysretq
user:
        mov     rax, r14
        mov     ecx, 1000000
user_work:
        turn    user_work
        movq    xmm0, rax               # SSE's registers are there too
        movq    r14, xmm0
        syscall
system_call:
        say     'U'

        mov     ecx, 16
digit:                                  # the result, highest digit first
        rol     r14, 4
        mov     eax, r14d
        and     al, 15
        add     al, '0'
        cmp     al, '9'
        jbe     1f
        add     al, 'a' - '0' - 10
1:      out     DEBUGCON, al
        dec     ecx
        jnz     digit
        mov     al, 0x10
        out     EXIT, al
fail:
        hlt
        jmp     fail

set_gate:                               # rdi: the entry, rax: the handler
        mov     [rdi], ax
        mov     word ptr [rdi + 2], 0x18
        mov     word ptr [rdi + 4], 0x8e00      # present, an interrupt gate
        shr     rax, 16
        mov     [rdi + 6], ax
        ret                             # the handlers are below 4 GiB: the rest stays 0

page_fault:                             # the stack: error code, RIP, CS, RFLAGS, RSP, SS
        mov     rax, cr2
        cmp     rax, ALIAS + 0x100
        jne     fail
        mov     dword ptr [PT_FAULT], PAGE + TABLE
        mov     dword ptr [PD_FAULT], PT_FAULT + TABLE
        add     rsp, 8
        iretq

tick:
        inc     r15d
        mov     dword ptr [rbp + 0xb0], 0       # end of interrupt
        iretq

# ---------------------------------------------------------------- descriptors
        .balign 8
gdt:
        .quad   0
        .quad   0x00cf9b000000ffff      # 0x08  kernel code, 32 bits
        .quad   0x00cf93000000ffff      # 0x10  kernel data
        .quad   0x00af9b000000ffff      # 0x18  kernel code, 64 bits
        .quad   0x00cf93000000ffff      # 0x20  kernel data, where SYSCALL wants it
        .quad   0x00cff3000000ffff      # 0x28  user data
        .quad   0x00affb000000ffff      # 0x30  user code, 64 bits
gdtr:
        .word   gdtr - gdt - 1
        .long   BASE + gdt - start
idtr:
        .word   16 * 33 - 1
        .quad   IDT
