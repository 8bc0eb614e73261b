# The built-in guest (docs/workload.md). 32-bit, flat, no paging. It is linked nowhere: every absolute
# address is a distance from `start` plus the address it is loaded at.
#
# ebp is the address of the vCPU's own block, in handlers too; nothing else ever goes there.

.set BASE,        {BASE}            # where the image is loaded
.set START_PAGE,  {START_PAGE}
.set MAILBOX,     {MAILBOX}

.set TRAMPOLINE,  0x8000            # of the other vCPUs; SIPI vector 8
.set BLOCKS,      0x20000           # one page per vCPU: its block below, its stack from above
.set IDT,         0x30000
.set DEVICES,     0x31000           # 32 bytes per device
.set RATE,        0x32000           # page writes per second, all vCPUs
.set ONLINE,      0x32004           # vCPUs that run, but for the first
.set DEVICES_MAX, 8
.set VCPUS_MAX,   16

# start page
.set S_WS_BASE,   START_PAGE + 0x08
.set S_WS_PAGES,  START_PAGE + 0x10
.set S_RATE,      START_PAGE + 0x14
.set S_RING_PAGES,START_PAGE + 0x1c
.set S_RING_BASE, START_PAGE + 0x20
.set S_VCPUS,     START_PAGE + 0x28
.set S_DMA_RATE,  START_PAGE + 0x2c

# mailbox
.set M_MAGIC,     MAILBOX + 0x00
.set M_CMD_SEQ,   MAILBOX + 0x04
.set M_CMD,       MAILBOX + 0x08
.set M_ARG0,      MAILBOX + 0x0c
.set M_ARG1,      MAILBOX + 0x10
.set M_ARG2,      MAILBOX + 0x14
.set M_ACK_SEQ,   MAILBOX + 0x20
.set M_RESULT,    MAILBOX + 0x24
.set M_ERRORS,    MAILBOX + 0x28
.set M_WRITES_LO, MAILBOX + 0x2c
.set M_WRITES_HI, MAILBOX + 0x30
.set M_BEATS,     MAILBOX + 0x34
.set M_DEVICES,   MAILBOX + 0x38
.set M_TICKS,     MAILBOX + 0x3c
.set M_IRQS,      MAILBOX + 0x40    # + 32 i: all, vector 0 to 3, INTx
.set M_VCPUS,     MAILBOX + 0x200   # + 16 c: writes (u64), ticks

# the block of a vCPU, from ebp
.set B_INDEX,     0
.set B_TICKS,     4
.set B_SEEN,      8                 # ticks the rate has been counted for
.set B_CREDIT,    12                # thousandths of page writes it may do
.set B_COUNT,     16                # u64: page writes done
.set B_PAGE,      24                # the next page
.set B_LEFT,      28                # pages left in this round
.set B_PAGES,     32                # pages of its part
.set B_FIRST,     36                # the first of them
.set B_STRIDE,    40                # bytes from one to the next
.set B_RECORD,    44                # its record in the mailbox

# a device
.set D_CONFIG,    0                 # address of its configuration space for port 0xcf8
.set D_MSIX,      4                 # offset of its MSI-X capability
.set D_EXPRESS,   8                 # offset of its PCI Express capability
.set D_BAR0,      12
.set D_BAR2,      16
.set D_RATE,      20
.set D_INDEX,     24

# registers of a device
.set R_ID,        0x00
.set R_CONTROL,   0x08
.set R_STATUS,    0x0c
.set R_CONFIG_KIB,0x10
.set R_CONFIG_GEN,0x14
.set R_CONFIG_ACK,0x18
.set R_DMA_LO,    0x1c
.set R_DMA_HI,    0x20
.set R_DMA_PAGES, 0x24
.set R_DMA_RATE,  0x28
.set R_DOORBELL,  0x2c
.set R_VECTOR,    0x38
.set R_FILL_KIB,  0x40

.set LAPIC,       0xfee00000
.set LAPIC_ID,    LAPIC + 0x20
.set LAPIC_EOI,   LAPIC + 0xb0
.set LAPIC_SVR,   LAPIC + 0xf0
.set LAPIC_ICR,   LAPIC + 0x300
.set LAPIC_TIMER, LAPIC + 0x320
.set LAPIC_COUNT, LAPIC + 0x380
.set LAPIC_DIVIDE,LAPIC + 0x3e0
.set IOAPIC,      0xfec00000

.set V_PIT,       0x30
.set V_TIMER,     0x31
.set V_INTX,      0x38              # + device
.set V_MSIX,      0x40              # + 4 * device + vector
.set V_SPURIOUS,  0xff
.set TICKS_PER_S, 1000

.set FATAL_VCPUS,     0xa0          # a vCPU did not come up
.set FATAL_INTERRUPT, 0xa1          # an interrupt nobody asked for

.section .rodata.vmferry_workload, "a", @progbits
.globl vmferry_workload_start
.globl vmferry_workload_end
.p2align 4
.code32

vmferry_workload_start:
start:
    cli
    cld
    lgdt (gdt_pointer - start + BASE)
    ljmpl $0x08, $(1f - start + BASE)
1:  movl $BLOCKS, %ebp
    movw $0x10, %ax
    movw %ax, %ss
    leal 0x1000(%ebp), %esp
    call load_segments
    # The first of what the host sees: whatever was in these pages belongs to an earlier life.
    movl $0, ONLINE
    movl S_RATE, %eax
    movl %eax, RATE
    xorl %eax, %eax
    call set_up_block

    call build_idt
    lidt (idt_pointer - start + BASE)
    movb $0xff, %al                 # no interrupt of the PICs
    outb %al, $0x21
    outb %al, $0xa1
    movl $(0x100 | V_SPURIOUS), LAPIC_SVR
    movl $2, %eax                   # the PIT comes in at pin 2
    movl $V_PIT, %ecx
    call set_pin
    movb $0x34, %al                 # channel 0, rate generator
    outb %al, $0x43
    movl $(1193182 / TICKS_PER_S), %eax
    outb %al, $0x40
    movb %ah, %al
    outb %al, $0x40
    sti

    call start_others
    call find_devices
    movl $(hello - start + BASE), %esi
    call print
    movl ${MAILBOX_MAGIC}, M_MAGIC
    jmp main

# ---------------------------------------------------------------------------------------- main loop

main:
    cmpl $0, B_INDEX(%ebp)
    jne 1f
    movl M_CMD_SEQ, %eax
    cmpl M_ACK_SEQ, %eax
    je 1f
    call command
1:  movl RATE, %eax
    cmpl $-1, %eax
    je 4f
    movl B_TICKS(%ebp), %ecx
    subl B_SEEN(%ebp), %ecx
    jz 3f
    addl %ecx, B_SEEN(%ebp)
    cmpl $100, %ecx
    jbe 2f
    movl $100, %ecx
    # This vCPU's share of the rate: (rate + vCPUs - 1 - index) / vCPUs, at most 2,000,000.
2:  movl S_VCPUS, %ebx
    leal -1(%eax,%ebx), %eax
    subl B_INDEX(%ebp), %eax
    xorl %edx, %edx
    divl %ebx
    cmpl $2000000, %eax
    jbe 2f
    movl $2000000, %eax
2:  movl %eax, %ebx
    mull %ecx
    addl B_CREDIT(%ebp), %eax
    # What it could not do within a second is forgotten; so does a lower rate take effect at once.
    imull $TICKS_PER_S, %ebx, %ebx
    cmpl %ebx, %eax
    jbe 2f
    movl %ebx, %eax
2:  movl %eax, B_CREDIT(%ebp)
3:  cmpl $TICKS_PER_S, B_CREDIT(%ebp)
    jb 5f
    subl $TICKS_PER_S, B_CREDIT(%ebp)
4:  call write_page
    jmp main
5:  cli
    movl B_TICKS(%ebp), %eax
    cmpl B_SEEN(%ebp), %eax
    jne 6f
    sti
    hlt
6:  sti
    jmp main

# One page write, with the check of what the last round left there.
write_page:
    movl B_PAGE(%ebp), %edi
    movl B_COUNT(%ebp), %eax
    movl B_COUNT+4(%ebp), %edx
    movl %eax, %ecx
    movl %edx, %ebx
    subl B_PAGES(%ebp), %ecx
    sbbl $0, %ebx
    jnc 1f
    xorl %ecx, %ecx                 # the first round: 0
    xorl %ebx, %ebx
    jmp 2f
1:  addl $1, %ecx
    adcl $0, %ebx
2:  cmpl %ecx, 8(%edi)
    jne 7f
    cmpl %ebx, 12(%edi)
    jne 7f
3:  addl $1, %eax
    adcl $0, %edx
    movl %eax, 8(%edi)
    movl %edx, 12(%edi)
    movl %eax, B_COUNT(%ebp)
    movl %edx, B_COUNT+4(%ebp)
    movl B_RECORD(%ebp), %esi
    movl %eax, (%esi)
    movl %edx, 4(%esi)
    lock addl $1, M_WRITES_LO
    jnc 4f
    lock addl $1, M_WRITES_HI
4:  decl B_LEFT(%ebp)
    jz 5f
    addl B_STRIDE(%ebp), %edi
    movl %edi, B_PAGE(%ebp)
    ret
5:  movl B_PAGES(%ebp), %eax
    movl %eax, B_LEFT(%ebp)
    movl B_FIRST(%ebp), %eax
    movl %eax, B_PAGE(%ebp)
    ret
7:  lock incl M_ERRORS
    jmp 3b

# The block at ebp, of vCPU eax: its part of the working set.
set_up_block:
    movl %eax, B_INDEX(%ebp)
    xorl %ecx, %ecx
    movl %ecx, B_TICKS(%ebp)
    movl %ecx, B_SEEN(%ebp)
    movl %ecx, B_CREDIT(%ebp)
    movl %ecx, B_COUNT(%ebp)
    movl %ecx, B_COUNT+4(%ebp)
    movl %eax, %ecx
    shll $4, %ecx
    addl $M_VCPUS, %ecx
    movl %ecx, B_RECORD(%ebp)
    movl %eax, %ecx
    shll $12, %ecx
    addl S_WS_BASE, %ecx
    movl %ecx, B_FIRST(%ebp)
    movl %ecx, B_PAGE(%ebp)
    movl S_VCPUS, %ecx
    movl %ecx, %ebx
    shll $12, %ebx
    movl %ebx, B_STRIDE(%ebp)
    negl %eax                       # (pages + vCPUs - 1 - index) / vCPUs
    addl S_WS_PAGES, %eax
    leal -1(%eax,%ecx), %eax
    xorl %edx, %edx
    divl %ecx
    movl %eax, B_PAGES(%ebp)
    movl %eax, B_LEFT(%ebp)
    ret

# ----------------------------------------------------------------------------------------- commands

command:
    pushl M_CMD_SEQ
    movl M_CMD, %eax
    cmpl $2, %eax
    je set_rate
    cmpl $5, %eax
    je power_off
    cmpl $7, %eax
    je triple_fault
    cmpl $8, %eax
    je reset_machine
    # The others name a device.
    cmpl $1, %eax
    jb unknown
    cmpl $11, %eax
    ja unknown
    movl M_ARG0, %esi
    cmpl M_DEVICES, %esi
    jae no_such
    shll $5, %esi
    addl $DEVICES, %esi
    movl D_BAR0(%esi), %ebx
    cmpl $4, %eax
    je reset_device
    cmpl $-1, R_ID(%ebx)
    je gone
    cmpl $1, %eax
    je reconfigure
    cmpl $3, %eax
    je ring
    cmpl $6, %eax
    je fill
    cmpl $9, %eax
    je mask
    cmpl $10, %eax
    je set_dma_rate
    jmp set_mode

unknown:
    movl $1, %eax
    jmp answer
no_such:
    movl $2, %eax
    jmp answer
gone:
    movl $4, %eax
    jmp answer
done:
    xorl %eax, %eax
answer:
    movl %eax, M_RESULT
    popl M_ACK_SEQ
    ret

set_rate:
    movl M_ARG0, %eax
    movl %eax, RATE
    jmp done

reconfigure:
    movl M_ARG2, %eax
    movl %eax, R_CONFIG_KIB(%ebx)
    movl M_ARG1, %eax
    movl %eax, R_CONFIG_GEN(%ebx)
    movl B_TICKS(%ebp), %ecx
1:  cmpl R_CONFIG_ACK(%ebx), %eax
    je done
    hlt
    movl B_TICKS(%ebp), %edx
    subl %ecx, %edx
    cmpl $(5 * TICKS_PER_S), %edx
    jb 1b
    movl $3, %eax
    jmp answer

ring:
    movl M_ARG2, %eax
    cmpl $3, %eax
    ja no_such
    movl %eax, R_VECTOR(%ebx)
    movl M_ARG1, %eax
    movl %eax, R_DOORBELL(%ebx)
    jmp done

fill:
    movl M_ARG1, %eax
    movl %eax, R_FILL_KIB(%ebx)
    jmp done

mask:
    movl M_ARG1, %eax
    cmpl $3, %eax
    ja no_such
    shll $4, %eax
    addl D_BAR2(%esi), %eax
    movl M_ARG2, %ecx
    andl $1, %ecx
    movl %ecx, 12(%eax)
    jmp done

set_dma_rate:
    movl M_ARG1, %eax
    movl %eax, D_RATE(%esi)
    call apply_dma_rate
    jmp done

set_mode:
    xorl %ecx, %ecx
    movl $0x0006, %eax              # memory, bus master
    cmpl $0, M_ARG1
    je 1f
    movl $0x8000, %ecx              # MSI-X enable
    movl $0x0406, %eax              # INTx off
1:  pushl %eax
    movl %ecx, %eax
    movl D_MSIX(%esi), %ecx
    addl $2, %ecx
    call config_write16
    popl %eax
    movl $4, %ecx
    call config_write16
    jmp done

reset_device:
    movl D_EXPRESS(%esi), %ecx
    addl $8, %ecx
    movl $0x8000, %eax              # Initiate FLR
    call config_write16
    movl $110, %eax                 # PCI Express: 100 ms
    call wait_ticks
    call set_up_device
    testl %eax, %eax
    jz done
    movl $3, %eax
    jmp answer

power_off:
    call answer_first
    outb %al, $0xf6
    jmp halt

triple_fault:
    call answer_first
    lidt (no_idt - start + BASE)
    int3
    jmp halt

reset_machine:
    call answer_first
    movb $6, %al
    movw $0xcf9, %dx
    outb %al, %dx
    jmp halt

answer_first:
    xorl %eax, %eax
    movl %eax, M_RESULT
    movl M_CMD_SEQ, %ecx
    movl %ecx, M_ACK_SEQ
    ret

halt:
    cli
    hlt
    jmp halt

# ------------------------------------------------------------------------------------------ devices

# All devices of our kind on bus 0, in slot order.
find_devices:
    pushl $0                        # slot
1:  movl (%esp), %edi
    shll $11, %edi
    orl $0x80000000, %edi
    movl M_DEVICES, %esi
    movl %esi, %ebx
    shll $5, %esi
    addl $DEVICES, %esi
    movl %edi, D_CONFIG(%esi)
    xorl %ecx, %ecx
    call config_read
    cmpl ${DEVICE_ID}, %eax
    jne 2f
    movl %ebx, D_INDEX(%esi)
    shll $16, %ebx
    addl ${MMIO_START}, %ebx
    movl %ebx, D_BAR0(%esi)
    addl $0x1000, %ebx
    movl %ebx, D_BAR2(%esi)
    movl S_DMA_RATE, %eax
    movl %eax, D_RATE(%esi)
    call find_capabilities
    movl D_INDEX(%esi), %eax        # its INTx: level-triggered pin 16 + device
    leal V_INTX + 0x8000(%eax), %ecx
    movl (%esp), %eax
    addl $15, %eax                  # slot 1 is pin 16
    call set_pin
    call set_up_device
    testl %eax, %eax
    jnz 2f
    incl M_DEVICES
2:  incl (%esp)
    cmpl $32, (%esp)
    jae 3f
    cmpl $DEVICES_MAX, M_DEVICES
    jb 1b
3:  popl %eax
    ret

find_capabilities:
    movl $0x34, %ecx
    call config_read
    movzbl %al, %ecx
    movl $48, %edi
1:  andl $0xfc, %ecx
    jz 4f
    pushl %ecx
    call config_read
    popl %ecx
    cmpb $0x11, %al
    jne 2f
    movl %ecx, D_MSIX(%esi)
2:  cmpb $0x10, %al
    jne 3f
    movl %ecx, D_EXPRESS(%esi)
3:  movzbl %ah, %ecx
    decl %edi
    jnz 1b
4:  ret

# Device esi from reset to work. eax: 0, or 4 if it does not answer.
set_up_device:
    movl D_BAR0(%esi), %ebx
    movl %ebx, %eax
    movl $0x10, %ecx
    call config_write
    movl D_BAR2(%esi), %eax
    movl $0x18, %ecx
    call config_write
    movl $0x0406, %eax              # memory, bus master, INTx off
    movl $4, %ecx
    call config_write16
    cmpl ${DEVICE_MAGIC}, R_ID(%ebx)
    jne 9f

    movl D_BAR2(%esi), %edi         # vector v goes to vCPU v mod vCPUs
    movl D_INDEX(%esi), %ecx
    shll $2, %ecx
    addl $V_MSIX, %ecx
    pushl $0
1:  movl (%esp), %eax
    xorl %edx, %edx
    divl S_VCPUS
    shll $12, %edx
    addl $LAPIC, %edx
    movl %edx, (%edi)
    movl $0, 4(%edi)
    movl %ecx, 8(%edi)
    movl $0, 12(%edi)
    addl $16, %edi
    incl %ecx
    incl (%esp)
    cmpl $4, (%esp)
    jb 1b
    popl %eax
    movl $0x8000, %eax
    movl D_MSIX(%esi), %ecx
    addl $2, %ecx
    call config_write16

    movl S_RING_PAGES, %eax
    movl %eax, R_DMA_PAGES(%ebx)
    mull D_INDEX(%esi)
    shll $12, %eax
    addl S_RING_BASE, %eax
    movl %eax, R_DMA_LO(%ebx)
    movl S_RING_BASE+4, %eax
    movl %eax, R_DMA_HI(%ebx)
    call apply_dma_rate
    xorl %eax, %eax
    ret
9:  movl $4, %eax
    ret

apply_dma_rate:
    movl D_RATE(%esi), %eax
    movl %eax, R_DMA_RATE(%ebx)
    cmpl $1, %eax                   # carry: no DMA
    movl $2, %eax                   # interrupts on
    sbbl $-1, %eax
    movl %eax, R_CONTROL(%ebx)
    ret

# Configuration space of device esi at offset ecx; value in eax. Clobbers edx.
config_read:
    call config_select
    inl %dx, %eax
    ret
config_write:
    pushl %eax
    call config_select
    popl %eax
    outl %eax, %dx
    ret
config_write16:
    pushl %eax
    call config_select
    popl %eax
    movl %ecx, %edx
    andl $2, %edx
    addl $0xcfc, %edx
    outw %ax, %dx
    ret
config_select:
    movl D_CONFIG(%esi), %eax
    orl %ecx, %eax
    andl $0xfffffffc, %eax
    movw $0xcf8, %dx
    outl %eax, %dx
    movl $0xcfc, %edx
    ret

# IOAPIC pin eax: vector and mode ecx, to the first vCPU.
set_pin:
    leal 0x10(%eax,%eax), %eax
    movl %eax, IOAPIC
    movl %ecx, IOAPIC + 0x10
    incl %eax
    movl %eax, IOAPIC
    movl $0, IOAPIC + 0x10
    ret

# Waits for eax timer ticks.
wait_ticks:
    movl B_TICKS(%ebp), %ecx
1:  hlt
    movl B_TICKS(%ebp), %edx
    subl %ecx, %edx
    cmpl %eax, %edx
    jb 1b
    ret

# The string at esi, to the serial port.
print:
1:  movw $0x3fd, %dx
2:  inb %dx, %al
    testb $0x20, %al
    jz 2b
    lodsb
    testb %al, %al
    jz 3f
    movw $0x3f8, %dx
    outb %al, %dx
    jmp 1b
3:  ret

# -------------------------------------------------------------------------------------- other vCPUs

start_others:
    cmpl $1, S_VCPUS
    jbe 2f
    movl $(trampoline - start + BASE), %esi
    movl $TRAMPOLINE, %edi
    movl $(trampoline_end - trampoline), %ecx
    rep movsb
    movl $0x000c4500, LAPIC_ICR     # INIT to all others
    movl $11, %eax
    call wait_ticks
    movl $(0x000c4600 | TRAMPOLINE >> 12), LAPIC_ICR
    movl $2, %eax
    call wait_ticks
    movl $(0x000c4600 | TRAMPOLINE >> 12), LAPIC_ICR
    movl B_TICKS(%ebp), %ecx
1:  movl ONLINE, %eax
    incl %eax
    cmpl S_VCPUS, %eax
    jae 2f
    hlt
    movl B_TICKS(%ebp), %edx
    subl %ecx, %edx
    cmpl $(10 * TICKS_PER_S), %edx
    jb 1b
    movb $FATAL_VCPUS, %al
    jmp fatal
2:  ret

.code16
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl (trampoline_gdt - trampoline + TRAMPOLINE)
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $0x08, $(other - start + BASE)
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt - start + BASE
trampoline_end:
.code32

other:
    movw $0x10, %ax                 # its stack follows from its number, which is in memory
    movw %ax, %ds
    movl LAPIC_ID, %eax
    shrl $24, %eax
    movl %eax, %ebp
    shll $12, %ebp
    addl $BLOCKS, %ebp
    movw $0x10, %cx
    movw %cx, %ss
    leal 0x1000(%ebp), %esp
    pushl %eax
    call load_segments
    popl %eax
    call set_up_block
    lidt (idt_pointer - start + BASE)
    movl $(0x100 | V_SPURIOUS), LAPIC_SVR
    movl $0xb, LAPIC_DIVIDE         # by 1
    movl $(0x20000 | V_TIMER), LAPIC_TIMER
    movl $(1000000000 / TICKS_PER_S), LAPIC_COUNT
    lock incl ONLINE
    sti
    jmp main

load_segments:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %fs
    movw %ax, %gs
    movw %ax, %ss
    ret

# --------------------------------------------------------------------------------------- interrupts

# Gate ecx leads to eax.
set_gate:
    movw %ax, IDT(,%ecx,8)
    movw $0x08, IDT+2(,%ecx,8)
    movw $0x8e00, IDT+4(,%ecx,8)
    shrl $16, %eax
    movw %ax, IDT+6(,%ecx,8)
    ret

build_idt:
    xorl %ecx, %ecx
1:  movl $(on_unknown - start + BASE), %eax
    cmpl $32, %ecx
    jae 2f
    leal (exceptions - start + BASE)(,%ecx,8), %eax
2:  call set_gate
    incl %ecx
    cmpl $256, %ecx
    jb 1b
    movl $(on_pit - start + BASE), %eax
    movl $V_PIT, %ecx
    call set_gate
    movl $(on_timer - start + BASE), %eax
    movl $V_TIMER, %ecx
    call set_gate
    movl $(on_spurious - start + BASE), %eax
    movl $V_SPURIOUS, %ecx
    call set_gate
    xorl %ebx, %ebx
3:  leal (intx_stubs - start + BASE)(,%ebx,8), %eax
    leal V_INTX(%ebx), %ecx
    call set_gate
    incl %ebx
    cmpl $DEVICES_MAX, %ebx
    jb 3b
    xorl %ebx, %ebx
4:  leal (msix_stubs - start + BASE)(,%ebx,8), %eax
    leal V_MSIX(%ebx), %ecx
    call set_gate
    incl %ebx
    cmpl $(4 * DEVICES_MAX), %ebx
    jb 4b
    ret

# IRET. KVM's instruction emulator, which executes all of a 32-bit guest where there is no hardware for
# it, does not know IRET in protected mode. Interrupts come only while they are enabled, and STI holds them
# off for one more instruction.
.macro end_of_interrupt
    pushl 8(%esp)
    andl $~0x200, (%esp)
    popfl
    sti
    lret $4
.endm

# The first vCPU's tick, with the heartbeat.
on_pit:
    pushl %eax
    incl M_BEATS
    outb %al, $0xf4
    jmp tick
# The others' tick.
on_timer:
    pushl %eax
tick:
    incl B_TICKS(%ebp)
    movl B_RECORD(%ebp), %eax
    incl 8(%eax)
    lock incl M_TICKS
    movl $0, LAPIC_EOI
    popl %eax
    end_of_interrupt

on_msix:
    pushl %eax
    pushl %ecx
    movl 8(%esp), %eax              # 4 * device + vector
    movl %eax, %ecx
    shrl $2, %ecx
    andl $3, %eax
    shll $5, %ecx
    lock incl M_IRQS(%ecx)
    lock incl M_IRQS+4(%ecx,%eax,4)
    movl $0, LAPIC_EOI
    popl %ecx
    popl %eax
    addl $4, %esp
    end_of_interrupt

on_intx:
    pushl %eax
    pushl %ecx
    movl 8(%esp), %ecx              # device
    shll $5, %ecx
    lock incl M_IRQS(%ecx)
    lock incl M_IRQS+20(%ecx)
    movl DEVICES+D_BAR0(%ecx), %eax
    movl $4, R_STATUS(%eax)         # lowers the line
    movl $0, LAPIC_EOI
    popl %ecx
    popl %eax
    addl $4, %esp
    end_of_interrupt

on_spurious:
    end_of_interrupt

on_unknown:
    movb $FATAL_INTERRUPT, %al
    jmp fatal
on_exception:
    popl %eax
# Error number al: the end.
fatal:
    outb %al, $0xf5
    jmp halt

.set n, 0
.p2align 3
exceptions:
.rept 32
    .p2align 3
    pushl $n
    jmp on_exception
    .set n, n + 1
.endr

.set n, 0
.p2align 3
intx_stubs:
.rept 8
    .p2align 3
    pushl $n
    jmp on_intx
    .set n, n + 1
.endr

.set n, 0
.p2align 3
msix_stubs:
.rept 32
    .p2align 3
    pushl $n
    jmp on_msix
    .set n, n + 1
.endr

# --------------------------------------------------------------------------------------------- data

.p2align 3
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # code
    .quad 0x00cf93000000ffff        # data
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt - start + BASE
idt_pointer:
    .word 256 * 8 - 1
    .long IDT
no_idt:
    .word 0
    .long 0
hello:
    .asciz "vmferry workload: ready\r\n"
vmferry_workload_end:
.code64
.text
