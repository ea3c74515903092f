// The probe guest for arm64: what x86_64.S does for x86-64, as firmware of QEMU's machine "virt".
//
//     L  64-bit code      the reset vector, EL1
//     M  paging           translation tables, SCTLR_EL1.M
//     F  page fault       an unmapped page is touched; our handler maps it; the access is repeated
//     T  timer            the virtual timer reaches its time, three times
//     K  kernel work      5 million turns of a loop in EL1
//     U  user work        1 million turns in EL0, entered by ERET and left by SVC
//     16 hex digits       what both loops computed; labkit.hypervisors.probe knows the answer
//
// It speaks on the PL011 serial port and ends by PSCI's SYSTEM_OFF, so that QEMU exits with 0.
// The timer is polled, not awaited: the interrupt controller is another one on each host (GIC version
// 2 or 3), and a probe that knew both would be more code than the rest of it.
//
// Written by the Arm Architecture Reference Manual, chapter D8 (translation), and tried under TCG only.
//
// Memory: flash at 0 (this code), devices below 1 GiB, RAM from 1 GiB (0x40000000):
//         +0x0000 level 1 table, +0x1000 level 2, +0x2000 level 3, +0x10000 the page that is mapped.

        .equ    RAM, 0x40000000
        .equ    UART, 0x09000000
        .equ    SYSTEM_OFF, 0x84000008
        .equ    DEVICE, 0x401           // block, accessed, attribute 0, for EL1
        .equ    FLASH, 0x4c5            // block, accessed, attribute 1, read-only, for EL0 too
        .equ    NORMAL, 0x745           // block, accessed, shared, attribute 1, for EL0 too
        .equ    NORMAL_PAGE, 0x747      // the same for a page
        .equ    TABLE, 0x3

        .macro  say letter
        mov     w0, #\letter
        str     w0, [x20]
        .endm

        .macro  turn label              // one turn of the computation on x21, counted down in x22
        mul     x21, x21, x23
        ror     x21, x21, #41           // left by 23
        eor     x21, x21, x22
        subs    x22, x22, #1
        b.ne    \label
        .endm

start:
        mov     x20, #UART
        say     'L'
        adr     x0, vectors
        msr     vbar_el1, x0

        mov     x1, #RAM                // level 1: the first GiB by level 2, RAM as one block, then none
        mov     x2, #0
clear:                                  // the three tables
        str     xzr, [x1, x2]
        add     x2, x2, #8
        cmp     x2, #0x3000
        b.ne    clear
        add     x0, x1, #0x1000
        add     x2, x0, #TABLE
        str     x2, [x1]
        mov     x2, #RAM
        add     x2, x2, #NORMAL
        str     x2, [x1, #8]
        mov     x2, #FLASH              // level 2: 2 MiB blocks, the flash and the serial port
        str     x2, [x0]
        mov     x2, #UART
        add     x2, x2, #DEVICE
        str     x2, [x0, #8 * (UART >> 21)]
        mov     x2, #0
drop:                                   // written past the caches: what those hold of it is stale
        add     x3, x1, x2
        dc      ivac, x3
        add     x2, x2, #16             // the smallest line that there is
        cmp     x2, #0x3000
        b.ne    drop
        mov     x2, #0xff00             // attribute 0: device, 1: write-back memory
        msr     mair_el1, x2
        ldr     x2, =0x200803519        // TCR: 39 bits, 4 KiB, cached, no TTBR1, 40 physical bits
        msr     tcr_el1, x2
        msr     ttbr0_el1, x1
        dsb     sy
        tlbi    vmalle1
        dsb     sy
        isb
        mrs     x2, sctlr_el1
        orr     x2, x2, #1              // M: translation on
        msr     sctlr_el1, x2
        isb
        say     'M'

        mov     x3, #0x20000000         // 512 MiB: not mapped
        mov     w4, #0x1234
        str     w4, [x3, #0x100]
        ldr     x5, =RAM + 0x10000
        ldr     w5, [x5, #0x100]
        cmp     w4, w5
        b.ne    fail
        say     'F'

        mrs     x2, cntfrq_el0
        mov     x3, #1000
        udiv    x2, x2, x3              // 1 ms
        mov     w4, #3
another_tick:
        msr     cntv_tval_el0, x2
        mov     x3, #3                  // enabled, its interrupt masked
        msr     cntv_ctl_el0, x3
        isb
until_tick:
        mrs     x3, cntv_ctl_el0
        tbz     x3, #2, until_tick      // ISTATUS
        subs    w4, w4, #1
        b.ne    another_tick
        msr     cntv_ctl_el0, xzr
        say     'T'

        ldr     x23, =0x9e3779b97f4a7c15
        ldr     x22, =5000000
        mov     x21, #1
kernel_work:
        turn    kernel_work
        say     'K'

        adr     x0, user
        msr     elr_el1, x0
        mov     x0, #0x3c0              // EL0, interrupts masked
        msr     spsr_el1, x0
        eret
user:
        ldr     x22, =1000000
user_work:
        turn    user_work
        svc     #0

system_call:
        say     'U'
        mov     w22, #16
digit:                                  // the result, highest digit first
        ror     x21, x21, #60
        and     w0, w21, #15
        add     w0, w0, #'0'
        cmp     w0, #'9'
        b.ls    1f
        add     w0, w0, #'a' - '0' - 10
1:      str     w0, [x20]
        subs    w22, w22, #1
        b.ne    digit
        ldr     w0, =SYSTEM_OFF
        hvc     #0
fail:
        wfi
        b       fail

page_fault:
        mrs     x0, far_el1
        lsr     x0, x0, #12
        cmp     x0, #0x20000
        b.ne    fail
        ldr     x0, =RAM + 0x2000       // level 3: the page; level 2: level 3
        ldr     x1, =RAM + 0x10000 + NORMAL_PAGE
        str     x1, [x0]
        add     x1, x0, #TABLE
        ldr     x0, =RAM + 0x1000 + 8 * (0x20000000 >> 21)
        str     x1, [x0]
        dsb     sy
        eret

        .ltorg
        .balign 0x800
vectors:                                // sixteen entries of 128 bytes, of which two are expected
        .rept   4                       // with EL0's stack: none of ours
        b       fail
        .balign 0x80
        .endr
        b       page_fault              // synchronous, from EL1
        .balign 0x200
        mrs     x0, esr_el1             // synchronous, from EL0
        lsr     x0, x0, #26
        cmp     x0, #0x15               // SVC
        b.eq    system_call
        b       fail
